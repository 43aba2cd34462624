"""Settings that every test shares. The builders of small models and stores are modules beside this file."""

import os
import signal
import tempfile
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

_HOME = tempfile.TemporaryDirectory(prefix="ollama-forge-tests-")  # landings are recorded there, not in the real one
os.environ["OLLAMA_FORGE_HOME"] = _HOME.name


@pytest.fixture(autouse=True, scope="module")
def _home_of_this_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each file of tests has a registry of its own: names of models are the same in many of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OLLAMA_FORGE_HOME", str(tmp_path_factory.mktemp("forge-home")))
        yield


# A program that a shell starts in its background ignores Ctrl-C, and so do its children; some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
