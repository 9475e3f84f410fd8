"""Upload what is written into a directory to a repository on the hub, in one commit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def push(
    repo_id: str,
    write: Callable[[Path, str], None],
    *,
    keep: Iterable[str] = (),
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Make the repository where there is none, upload the files that `write` makes, and return the commit's address, or the pull request's.

    Args:
        repo_id: `owner/name`, or a name of the token's owner.
        write: is given an empty directory and the repository's full name.
        keep: files that are put into the directory first, where the repository has them, so that `write` can go on from them.
        commit_message: the commit's first line.
        commit_description: the rest of its text.
        private: only False makes a new repository public; one that exists stays as it is.
        token: instead of the one that `hf auth login` left.
        revision: a branch, made where there is none.
        create_pr: open a pull request instead of committing.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private is not False, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        staging = Path(name)
        for file in keep:
            try:
                found = api.hf_hub_download(repo, file, revision=revision)
            except EntryNotFoundError:
                continue
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, staging / file)
        write(staging, repo)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=staging,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return commit.pr_url or str(commit)
