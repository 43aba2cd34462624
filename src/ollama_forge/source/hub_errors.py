"""What goes wrong with the Hub, in words of our own: each case with what to do about it.

In: an exception of huggingface_hub or of the network. Out: a `HubError`. Headers, bodies and addresses that the server
sent are left out of the words: one of them could hold a token.
"""

from __future__ import annotations

from ollama_forge.errors import HubError


def hub_error(exc: Exception, repo: str, revision: str) -> HubError:
    """Words for `exc`, which came while `repo` was asked for at `revision`."""
    from huggingface_hub import errors

    status = status_of(exc)
    page = f"https://huggingface.co/{repo}"
    if isinstance(exc, errors.OfflineModeIsEnabled):
        return _offline(repo)
    if isinstance(exc, errors.GatedRepoError):
        return _gated(repo, page, status)
    if isinstance(exc, errors.DisabledRepoError):
        return HubError(f"{repo!r} is disabled on the Hub", next=f"See {page}")
    if isinstance(exc, errors.RevisionNotFoundError):
        return HubError(
            f"{repo!r} has no revision {revision!r}",
            why="A revision is a branch, a tag or a commit of 40 digits.",
            next=f"See its branches: {page}/tree/main",
        )
    if isinstance(exc, errors.EntryNotFoundError):
        return HubError(
            f"A file that {repo!r} lists is not there",
            why="The repo was changed while it was read, or its upload is not finished.",
            next="Run the command again.",
        )
    if status == 401 and not isinstance(exc, errors.RepositoryNotFoundError):
        return HubError(
            "The Hub does not accept your token",
            why="HF_TOKEN (or the one that `hf auth login` stored) is wrong or has expired.",
            next="Make a new one at https://huggingface.co/settings/tokens, then: hf auth login",
        )
    if isinstance(exc, errors.RepositoryNotFoundError):
        return HubError(
            f"There is no repo {repo!r} that you may see",
            why="It does not exist, or it is private and your token does not open it." if _has_token() else
            "It does not exist, or it is private and no token is set.",
            next="Check the spelling; for a private repo set HF_TOKEN, or run: hf auth login",
        )  # fmt: skip
    return _by_status(exc, repo, page, status)


def status_of(exc: Exception) -> int:
    """The HTTP status behind an exception; 0 when no answer came."""
    response = getattr(exc, "response", None)
    code = getattr(response, "status_code", 0)
    return code if isinstance(code, int) else 0


def is_out_of_reach(exc: Exception) -> bool:
    """Whether the Hub could not answer at all (no network, offline mode, its own failure): the cache may do instead."""
    return status_of(exc) in (0, 408, 429) or status_of(exc) >= 500


def _by_status(exc: Exception, repo: str, page: str, status: int) -> HubError:
    if status == 403:
        return HubError(
            f"The Hub does not let you read {repo!r}",
            why="Your token has no right to it, or your address is blocked.",
            next=f"Look at {page} with the account of your token.",
        )
    if status == 429:
        return HubError(
            "The Hub says that you asked too often",
            why="It limits how many requests come in a few minutes, more so without a token.",
            next="Wait a few minutes, then run the same command again; what came so far is kept. "
            "A token (HF_TOKEN) raises the limit.",
        )
    if status >= 500:
        return HubError(
            f"The Hub has a failure of its own (status {status})",
            next="Run the same command again later; what came so far is kept. See https://status.huggingface.co",
        )
    if status >= 400:
        return HubError(f"The Hub refused a request about {repo!r} (status {status})", next=f"See {page}")
    return HubError(
        "The Hub is out of reach",
        why=f"No answer from the network ({type(exc).__name__}).",
        next="Check your connection (and HF_ENDPOINT, HTTPS_PROXY), then run the same command again; "
        "what came so far is kept.",
    )


def _offline(repo: str) -> HubError:
    return HubError(
        f"{repo!r} is not in this machine's cache at that revision, and HF_HUB_OFFLINE forbids to ask the Hub",
        next="Unset HF_HUB_OFFLINE to download it.",
    )


def _gated(repo: str, page: str, status: int) -> HubError:
    if status == 401 or not _has_token():
        return HubError(
            f"{repo!r} is gated: its owner wants to know who reads it",
            why="No token is set." if not _has_token() else "Your token was not accepted.",
            next=f"Accept its terms at {page}, then set HF_TOKEN or run: hf auth login",
        )
    return HubError(
        f"{repo!r} is gated, and the account of your token is not on its list",
        why="You have not accepted its terms, or the owner has not let you in yet.",
        next=f"Ask for access at {page}; a fine-grained token also needs the right to read gated repos.",
    )


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
