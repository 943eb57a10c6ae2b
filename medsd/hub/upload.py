"""A parcel -> one commit on the Hub: all of it is seen at once or nothing is, tried again where the Hub or the way to it fails for a while.

Large files go first, and are seen by nobody until the commit; those that the Hub has already are not sent again. So a push that was cut
off leaves what was there before, and the same push goes on where it stopped.
"""

import re
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from httpx2 import HTTPError

from medsd.errors import InputError, first_line
from medsd.hub.privacy import TOKEN, Parcel, Stamps, stamps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from huggingface_hub import HfApi

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between two tries of the same step."""
PASSING = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})
"""Answers after which another try may succeed; 412 and 409: somebody else wrote at the same moment."""
LAST = ("model_index.json", "README.md")
"""What says that a repository is complete closes the commit."""
MEANINGS = {
    401: "the Hub does not know this token, or it has expired; `hf auth login` signs in anew",
    403: "this token may not write there; sign in with one that may (`hf auth login`)",
    404: "there is no such user, organisation or branch",
    413: "the Hub takes no file as large as that",
    507: "the Hub has no room left there",
}
AGAIN = "the same push goes on where it stopped"

Result = TypeVar("Result")
Kind = Literal["model", "dataset", "space"]


@dataclass(frozen=True)
class Target:
    """A repository, and the branch of it."""

    name: str
    """`user/name`."""
    flag: str = "--hub_model_id"
    """What the user named it with."""
    kind: Kind = "model"
    private: bool = True
    revision: str | None = None
    """Branch; None is main."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """What a Space finds in its environment."""

    def __str__(self) -> str:
        branch = f" (branch {self.revision})" if self.revision else ""
        return f"{self.flag} {self.name}{branch}"


def upload(parcel: Parcel, target: Target, ours: Callable[[str], bool], message: str, before: Stamps | None = None) -> str:
    """Commit a parcel to a repository, which is made where it is not there yet; returns its address.

    Files of an earlier push (`ours(path)`) that are not in the parcel go in the same commit, those of others stay. `before` are `stamps` of
    the parcel when it was looked through: nothing that changed since is sent. Raises InputError for a public repository where a private one
    is wanted, and where the Hub refuses or cannot be reached; then nothing of it is visible.
    """
    from huggingface_hub import HfApi

    api, seen = HfApi(), stamps(parcel) if before is None else before
    with _one_line(target):
        url = _patiently(lambda: api.create_repo(target.name, repo_type=target.kind, private=target.private, exist_ok=True, **_sdk(target)))
        if target.private and not _patiently(lambda: api.repo_info(target.name, repo_type=target.kind)).private:
            raise InputError(f"{target}: this repository exists and is public; make it private, or choose another. Nothing was sent")
        if target.revision:
            _patiently(lambda: _branch(api, target))
        for name, value in target.variables.items():
            _patiently(partial(api.add_space_variable, target.name, name, value))
        _patiently(lambda: _commit(api, parcel, target, ours, message, seen))
    return str(url)


def stated_licence(target: Target) -> str | None:
    """What the card of the repository says already; None where it says nothing or is not there. Raises InputError as `upload`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with _one_line(target):
        try:
            card = _patiently(partial(HfApi().repo_info, target.name, repo_type=target.kind)).card_data
        except RepositoryNotFoundError:
            return None
    licence = card.get("license") if card else None
    return None if licence == "other" else licence


def check_sign_in(target: Target) -> None:
    """Raise InputError where nobody is signed in: before the work, not behind it."""
    from huggingface_hub import HfApi

    with _one_line(target):
        _patiently(HfApi().whoami)


def _branch(api: "HfApi", target: Target) -> None:
    """Make the branch where it is not there, from the repository's first commit, so that it begins without main's weights and card."""
    branches = [ref.name for ref in api.list_repo_refs(target.name, repo_type=target.kind).branches]
    if target.revision not in branches:
        first = api.list_repo_commits(target.name, repo_type=target.kind)[-1].commit_id
        api.create_branch(target.name, branch=target.revision, revision=first, repo_type=target.kind, exist_ok=True)


def _sdk(target: Target) -> dict[str, str]:
    return {"space_sdk": "gradio"} if target.kind == "space" else {}


def _commit(api: "HfApi", parcel: Parcel, target: Target, ours: Callable[[str], bool], message: str, seen: Stamps) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    now = stamps(parcel)
    if changed := [path for path, stamp in seen.items() if now.get(path) != stamp]:
        raise InputError(f"{changed[0]} has changed since it was looked through: nothing was sent; push again once nobody writes there")
    where = {"repo_id": target.name, "repo_type": target.kind, "revision": target.revision}
    old = [path for path in api.list_repo_files(**where) if ours(path) and path not in parcel]
    order = sorted(parcel, key=lambda path: LAST.index(path) if path in LAST else -1)
    operations = [
        *(CommitOperationDelete(path) for path in old),
        *(CommitOperationAdd(path, content if isinstance(content := parcel[path], bytes) else str(content)) for path in order),
    ]
    api.create_commit(**where, operations=operations, commit_message=message)


def _patiently(step: Callable[[], Result]) -> Result:
    """`step()`, again after a while where it failed for a reason that passes."""
    for wait in WAITS:
        try:
            return step()
        except (OSError, RuntimeError, HTTPError) as error:
            if not _passes(error):
                raise
            time.sleep(_wanted_wait(error) or wait)
    return step()


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed later: the Hub is busy, or the way to it broke, as each of its clients says it."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    if (status := _status(error)) is not None:
        return status in PASSING
    broke = (HTTPError, ConnectionError, TimeoutError)
    if isinstance(error, broke) or isinstance(error.__cause__, broke):
        return True
    # Xet's client, written in Rust, says of a broken way as of everything else a RuntimeError, behind which stands no other error.
    return isinstance(error, RuntimeError) and error.__cause__ is None and error.__context__ is None


def _answer(error: BaseException) -> Any:
    """The Hub's answer behind an error, perhaps behind one of a single file; None where the way to it broke."""
    return getattr(error, "response", None) or getattr(error.__cause__, "response", None)


def _status(error: BaseException) -> int | None:
    return getattr(_answer(error), "status_code", None)


def _wanted_wait(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait, at most a minute."""
    asked = getattr(_answer(error), "headers", {}).get("Retry-After", "")
    return min(float(asked), 60.0) if asked.isdigit() else None


@contextmanager
def _one_line(target: Target) -> "Iterator[None]":
    """Turn what the Hub's client raises into an InputError that says what to do."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except InputError:
        raise
    except HFValidationError as error:
        raise InputError(f"{target} is no repository name: user/name is expected") from error
    except LocalTokenNotFoundError as error:
        raise InputError(f"{target}: nobody is signed in; `hf auth login` does it") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{target}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    status, said = _status(error), redacted(first_line(error.__cause__ or error))
    if status in MEANINGS:
        return MEANINGS[status]
    if status in PASSING:
        return f"the Hub answered {status} {len(WAITS) + 1} times; {AGAIN}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids it; unset that"
    if _passes(error):
        return f"the way to the Hub broke {len(WAITS) + 1} times ({said}), so look there whether it took all; {AGAIN}"
    return f"the Hub took nothing ({said})"


def redacted(text: str) -> str:
    """Without tokens, and without the signed part of addresses."""
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", TOKEN.sub("hf_...", text))
