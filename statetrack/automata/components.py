"""Strongly connected components of a graph given as a table of successors. Legend: V nodes, X edges of each."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def strong_components(successors: Int[np.ndarray, "V X"]) -> Int[np.ndarray, "V"]:
    """Number the strongly connected components of a graph (Tarjan 1972, without recursion)."""
    edges = successors.tolist()
    index, low, component = [-1] * len(edges), [0] * len(edges), [-1] * len(edges)
    stack: list[int] = []
    count = components = 0
    for root in range(len(edges)):
        if index[root] != -1:
            continue
        index[root] = low[root] = count
        count += 1
        stack.append(root)
        path = [(root, iter(edges[root]))]
        while path:
            v, targets = path[-1]
            for w in targets:
                if index[w] == -1:
                    index[w] = low[w] = count
                    count += 1
                    stack.append(w)
                    path.append((w, iter(edges[w])))
                    break
                if component[w] == -1:
                    low[v] = min(low[v], index[w])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[v])
                if low[v] == index[v]:
                    while component[v] == -1:
                        component[stack.pop()] = components
                    components += 1
    return np.array(component)
