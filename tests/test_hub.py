"""A model that was pushed to the hub, loaded by others: with statetrack imported, not imported, not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import transformers
from huggingface_hub import HfApi, ModelCard
from transformers.utils import hub

from statetrack.convert import convert
from statetrack.hf import LOADER, LOADER_TEXT, StateTrackConfig, StateTrackForCausalLM
from statetrack.lm.tokenizers import train_tokenizer
from statetrack.unlock import unlock
from tests.lm_runs import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", LOADER}

LOAD = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("me/model", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("me/model")
out = model.generate(**tokenizer("def f", return_tensors="pt"), max_new_tokens=5, do_sample=False)
print(out[0].tolist(), AutoConfig.from_pretrained("me/model").model_type, type(model).__module__)
model.save_pretrained(sys.argv[1])
"""
IMPORTED = "import statetrack.hf\n" + LOAD.replace(", trust_remote_code=True", "")
NOT_TRUSTED = LOAD.replace(", trust_remote_code=True", "")
NOT_INSTALLED = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "statetrack":
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Missing())
{LOAD}"""


@pytest.fixture(scope="module")
def model() -> StateTrackForCausalLM:
    torch.manual_seed(0)
    mixers = ({"mixer": "deltaproduct", "heads": 2}, {"mixer": "attention", "heads": 2})
    config = StateTrackConfig(vocab_size=300, hidden_size=32, mixers=mixers, bos_token_id=0, eos_token_id=0)
    return StateTrackForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f"def f{i}(x):\n    return x + {i}  # {'abcdefghij'[i % 10] * i}\n" for i in range(60)]
    return train_tokenizer(texts, 300)


@pytest.fixture(scope="module")
def home(model, tokenizer, tmp_path_factory) -> Path:
    """A cache of the hub that holds what the model and the tokenizer, pushed to a hub of ours, sent there."""
    path = tmp_path_factory.mktemp("home")
    snapshot = path / "hub" / "models--me--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    asked = []

    def create_repo(_, repo_id: str, **_options):
        asked.append(repo_id)
        return type("Url", (str,), {"repo_id": repo_id})(f"https://hub/{repo_id}")

    def create_commit(_, repo_id: str, operations, **_options):
        asked.append(repo_id)
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, snapshot / operation.path_in_repo)

    card = ModelCard("---\nlibrary_name: transformers\n---\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HfApi, "create_repo", create_repo)
        patched.setattr(HfApi, "create_commit", create_commit)
        patched.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
        model.push_to_hub("me/model")
        tokenizer.push_to_hub("me/model")
    assert set(asked) == {"me/model"}
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    return path


@pytest.fixture(scope="module")
def ends(home: Path) -> dict[str, tuple[int, str, str]]:
    """Exit code, output and errors of processes that load the model by its name, without a network."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    scripts = {"trusted": LOAD, "imported": IMPORTED, "not trusted": NOT_TRUSTED, "not installed": NOT_INSTALLED}
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", script, str(home / name)], env=environment, cwd=home,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name, script in scripts.items()
    }  # fmt: skip
    return {name: (process.wait(120), *process.communicate()) for name, process in running.items()}


def test_what_is_pushed_is_the_model_the_tokenizer_and_three_lines_of_code(home: Path, model):
    (snapshot,) = (home / "hub").glob("*/snapshots/*")
    names = {path.name for path in snapshot.iterdir()}
    assert names >= {*MODEL_FILES, "README.md", "tokenizer.json", "tokenizer_config.json"}
    assert [path.name for path in snapshot.glob("*.py")] == [LOADER]
    assert (snapshot / LOADER).read_text() == LOADER_TEXT
    stored = load_file(snapshot / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("how", ["trusted", "imported"])
def test_others_load_it_and_save_it_again(how: str, ends, home: Path, model, tokenizer):
    """Trusting the file beside the weights, or having imported statetrack.hf, which no file can overrule."""
    code, out, err = ends[how]
    assert code == 0, err
    want = model.generate(**tokenizer("def f", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert out.strip() == f"{want[0].tolist()} statetrack statetrack.hf"
    assert {path.name for path in (home / how).iterdir()} == MODEL_FILES
    config = transformers.AutoConfig.from_pretrained(home / how)
    assert config.auto_map["AutoModelForCausalLM"] == "statetrack_loader.StateTrackForCausalLM"


def test_whoever_does_not_trust_it_or_lacks_statetrack_is_told_what_to_do(ends):
    code, _, err = ends["not trusted"]
    assert code == 1 and "trust_remote_code=True" in err.splitlines()[-1]
    code, _, err = ends["not installed"]
    assert code == 1
    assert "packages that were not found in your environment: statetrack. Run `pip install statetrack`" in err


def test_what_is_converted_or_unlocked_loads_the_same_way(tmp_path: Path):
    mixer = {"mixer": "deltaproduct", "heads": 2, "eigenvalues": (0.0, 1.0)}
    StateTrackForCausalLM(StateTrackConfig(vocab_size=30, hidden_size=32, mixers=[mixer])).save_pretrained(
        tmp_path / "a"
    )
    convert(tmp_path / "a", "delta_net", tmp_path / "b")
    convert(tmp_path / "b", "statetrack", tmp_path / "c")
    unlock(tmp_path / "a", tmp_path / "d")
    for name in "acd":
        assert (tmp_path / name / LOADER).read_text() == LOADER_TEXT
        assert transformers.AutoConfig.from_pretrained(tmp_path / name).auto_map["AutoConfig"].startswith("statetrack_")
    assert not (tmp_path / "b" / LOADER).exists() and "auto_map" not in (tmp_path / "b" / "config.json").read_text()
