"""statetrack: linear RNNs that track state."""
