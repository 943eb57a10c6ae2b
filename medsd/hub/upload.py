"""A parcel -> one commit on the Hub: all of it is seen at once or nothing is, tried again where the Hub or the way to it fails for a while.

Large files go first, and are seen by nobody until the commit; those that the Hub has already are not sent again. So a push that was cut
off leaves what was there before, and the same push goes on where it stopped.
"""

import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from medsd.errors import InputError
from medsd.hub.privacy import TOKEN, Parcel

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
AGAIN = "the same command goes on where it stopped"

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

    def __str__(self) -> str:
        branch = f" (branch {self.revision})" if self.revision else ""
        return f"{self.flag} {self.name}{branch}"


def upload(parcel: Parcel, target: Target, ours: Callable[[str], bool], message: str) -> str:
    """Commit a parcel to a repository, which is made where it is not there yet; returns its address.

    Files of an earlier push (`ours(path)`) that are not in the parcel go in the same commit, those of others stay. Raises InputError for a
    public repository where a private one is wanted, and where the Hub refuses or cannot be reached; then nothing of it is visible.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _one_line(target):
        url = _patiently(lambda: api.create_repo(target.name, repo_type=target.kind, private=target.private, exist_ok=True, **_sdk(target)))
        if target.private and not _patiently(lambda: api.repo_info(target.name, repo_type=target.kind)).private:
            raise InputError(f"{target}: this repository exists and is public; make it private, or choose another. Nothing was sent")
        if target.revision:
            _patiently(lambda: api.create_branch(target.name, branch=target.revision, repo_type=target.kind, exist_ok=True))
        _patiently(lambda: _commit(api, parcel, target, ours, message))
    return str(url)


def set_variable(target: Target, name: str, value: str) -> None:
    """Let a Space find a value in its environment; raises InputError where the Hub refuses."""
    from huggingface_hub import HfApi

    with _one_line(target):
        _patiently(lambda: HfApi().add_space_variable(target.name, name, value))


def _sdk(target: Target) -> dict[str, str]:
    return {"space_sdk": "gradio"} if target.kind == "space" else {}


def _commit(api: "HfApi", parcel: Parcel, target: Target, ours: Callable[[str], bool], message: str) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

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
    from httpx2 import HTTPError

    for wait in WAITS:
        try:
            return step()
        except (HTTPError, RuntimeError) as error:
            if not _passes(error):
                raise
            time.sleep(_wanted_wait(error) or wait)
    return step()


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed later: the way to the Hub broke, or it is busy."""
    status = _status(error)
    return status is None or status in PASSING


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
    from httpx2 import HTTPError
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{target} is no repository name: user/name is expected") from error
    except LocalTokenNotFoundError as error:
        raise InputError(f"{target}: nobody is signed in; `hf auth login` does it") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{target}: the Hub took nothing ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    if status in MEANINGS:
        return MEANINGS[status]
    if status in PASSING:
        return f"it answered {status} {len(WAITS) + 1} times; {AGAIN}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids it; unset that"
    said = redacted((str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0])
    return said if status is not None or isinstance(error, ValueError) else f"{said}; {AGAIN}"


def redacted(text: str) -> str:
    """Without tokens, and without the signed part of addresses."""
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", TOKEN.sub("hf_...", text))
