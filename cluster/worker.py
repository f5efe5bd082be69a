"""What a training process sees of the cluster: who it is, its way to the driver, its checkpoints, when to stop."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from cluster.checkpoint import (
    MANIFEST_FILE,
    CheckpointError,
    files_by_folder,
    is_manifest,
    newest_whole,
    stored_manifest,
    verify,
)
from cluster.errors import UserError
from cluster.snapshots import make_snapshot, remove_dead_snapshots
from cluster.storage import open_storage
from cluster.watch import Pulse

LEAVE_WITHIN_S = 5.0

Item = TypeVar("Item")

log = logging.getLogger(__name__)

_told_to_end = threading.Event()
"""Set in this process by SIGTERM."""


class Worker:
    """One training process. A worker of Ray Train is a `RayWorker`; tests and trials have their own."""

    def __init__(self, rank: int, world: int, device: str):
        """Say who it is.

        Args:
            rank: Of this process.
            world: Number of processes.
            device: `cuda` or `cpu`.
        """
        self.rank, self.world, self.device = rank, world, device

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to the driver's `on_message`; returns at once."""

    def warn(self, text: str) -> None:
        """Have people told of what does not stop the work."""
        log.warning(text)

    def beat(self, doing: str) -> None:
        """Say that work goes on; where it does not for long, the worker is taken for hung.

        Args:
            doing: What is being done, e.g. `step 120`.
        """

    def beating(self, items: Iterable[Item], doing: str) -> Iterator[Item]:
        """The items, with a beat for each."""
        for number, item in enumerate(items):
            self.beat(f"{doing}, batch {number}")
            yield item

    @property
    def should_stop(self) -> bool:
        """Whether this worker is to save a checkpoint and leave: its machine is taken away, or the run is stopped.

        Ranks learn of it at different times: act on it only after all have agreed.
        """
        return False

    def leave(self) -> None:
        """Go, after the last checkpoint; returns where another worker has to go. Every rank takes part."""

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        """The newest whole checkpoint as a local folder, or None; every rank gets the same one."""
        raise NotImplementedError

    @contextmanager
    def snapshot(self) -> Iterator[Path]:
        """An empty local folder for this rank's files of a checkpoint, to be handed to `report`."""
        folder = make_snapshot()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def uploading(self) -> bool:
        """Whether this rank's last checkpoint is still on its way to the storage."""
        return False

    def settle(self) -> None:
        """Wait until the last checkpoint is in the storage and counts. Every rank takes part."""

    def report(self, metrics: dict[str, Any], folder: Path, name: str) -> None:
        """Keep `folder` (each rank its own files, merged under `name`) as a checkpoint. Every rank takes part.

        Args:
            metrics: Hold `step`, by which checkpoints are put in order.
            folder: Of `snapshot`.
            name: Of the checkpoint's folder.
        """
        raise NotImplementedError


class RayWorker(Worker):
    """A worker of Ray Train."""

    def __init__(self, rank: int, world: int, device: str, mailbox: Any, folder_uri: str, pulse: Pulse):
        """Begin without a checkpoint.

        Args:
            rank: Of this process.
            world: Number of processes.
            device: `cuda` or `cpu`.
            mailbox: Handle of the driver's `cluster.mailbox.Mailbox`.
            folder_uri: Where the checkpoints' folders lie.
            pulse: Tells the driver that this process is alive, and brings its orders.
        """
        super().__init__(rank, world, device)
        self._mailbox, self._storage, self._pulse = mailbox, open_storage(folder_uri), pulse
        self._upload_done = threading.Event()
        self._upload_done.set()
        self._upload_moves = threading.Event()
        self._handed_over = self._saved_for_drain = False
        self._left_over: set[str] = set()
        remove_dead_snapshots()

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to the driver's `on_message`; returns at once."""
        self._mailbox.put.remote(message)

    def warn(self, text: str) -> None:
        """The driver shows it and hands it to `on_message`."""
        self.tell({"kind": "warning", "step": 0, "text": text})

    def beat(self, doing: str) -> None:
        """Say that work goes on."""
        self._pulse.beat(doing)

    @property
    def should_stop(self) -> bool:
        """SIGTERM, a node that Ray drains, or a driver that was told to stop."""
        drained = not self._saved_for_drain and _machine_is_drained()
        return _told_to_end.is_set() or self._pulse.run_stops or drained

    def leave(self) -> None:
        """End the run where the driver was told to stop; else end the processes whose machine goes away.

        The others go on to wait in vain for those that left, until Ray Train restarts all of them.
        """
        import ray

        self.settle()
        if self._pulse.run_stops:
            raise RunStopped
        if _told_to_end.is_set():
            text = f"rank {self.rank} on {socket.gethostname()} was told to go, and has left after a last checkpoint"
            message = {"kind": "lost", "step": 0, "text": text}
            with suppress(Exception):  # it goes in any case
                ray.get([self._mailbox.put.remote(message), self._mailbox.expect_loss.remote()], timeout=LEAVE_WITHIN_S)
            os._exit(128 + signal.SIGTERM)
        self._saved_for_drain = True  # Ray Train itself moves the group before the machine is gone

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        """The newest whole checkpoint as a local folder, or None; every rank gets the same one.

        A damaged one is passed over, with a warning that names the file, for the one before. Folders that no report
        has registered, of a save that was killed, are deleted; but where nothing is registered, no whole one.

        Raises:
            UserError: There are checkpoints and none is whole: starting anew silently would lose the run.
        """
        import ray.train

        # Where one step was saved twice, what was registered later is newer.
        reported = sorted(reversed(ray.train.get_all_reported_checkpoints()), key=lambda r: -r.metrics["step"])
        if self.rank == 0:
            self._remove_orphans({Path(item.checkpoint.path).name for item in reported})
        with ExitStack() as opened:
            # Rank 0 chooses: one that reads late could find what the others have saved meanwhile in a folder's place.
            name, folder = self._newest_whole(reported, opened) if self.rank == 0 else (None, None)
            name = self._of_rank_zero(name)
            if name is not None and folder is None:
                folder = opened.enter_context(_named(reported, name).as_directory())
                verify(Path(folder))
            if name is None and reported:
                raise UserError(
                    f"none of the {len(reported)} checkpoints below {Path(reported[0].checkpoint.path).parent} is "
                    "whole; delete that folder to train from the start"
                )
            self._of_rank_zero(None)  # nobody saves before all have read
            yield None if folder is None else Path(folder)

    def _newest_whole(self, reported: list[Any], opened: ExitStack) -> tuple[str | None, str | None]:
        """Name and local folder, which is `opened`, of the first of `reported` that is whole."""
        for candidate in reported:
            name = Path(candidate.checkpoint.path).name
            if not self._storage.exists(f"{name}/{MANIFEST_FILE}"):  # Ray would raise of a folder that is gone
                self.warn(
                    f"passed over: checkpoint {self._storage.uri}/{name} is not whole: {MANIFEST_FILE} is missing"
                )
                continue
            with ExitStack() as maybe:
                folder = maybe.enter_context(candidate.checkpoint.as_directory())
                if newest_whole([Path(folder)], self.warn) is not None:
                    self._left_over.discard(name)
                    opened.push(maybe.pop_all())
                    return name, folder
        return None, None

    def _of_rank_zero(self, name: str | None) -> str | None:
        """What rank 0 gives, on every rank, once all ranks are here."""
        from ray.train.collective import broadcast_from_rank_zero

        return broadcast_from_rank_zero(name)

    @contextmanager
    def snapshot(self) -> Iterator[Path]:
        """A folder on local disk that outlives the block when it was reported: its upload deletes it.

        The one before is waited for until it counts: there is at most one in flight, and no kill costs two.
        """
        self.settle()
        self._handed_over = False
        folder = make_snapshot()
        try:
            yield folder
        finally:
            if not self._handed_over:
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def uploading(self) -> bool:
        """Whether this rank's last checkpoint is still on its way to the storage."""
        return not self._upload_done.is_set()

    def settle(self) -> None:
        """Wait until the last checkpoint is in the storage and Ray Train has registered it."""
        import ray.train
        from ray.train import CheckpointConsistencyMode

        self._wait_for_upload()
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)

    def report(self, metrics: dict[str, Any], folder: Path, name: str) -> None:
        """Upload `folder` in the background, manifest last; this returns at once.

        An upload that fails ends the run with the storage's error, on every rank.
        """
        import ray.train
        from ray.train import CheckpointUploadMode

        if name in self._left_over:  # no rank uploads before this one has reported, too
            self._delete(name)
        self._handed_over = True
        self._upload_done.clear()
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._upload,
            delete_local_checkpoint_after_upload=True,
        )

    def _upload(self, checkpoint: Any, name: str) -> Any:
        """What Ray Train calls on its upload thread."""
        import ray
        import ray.train

        folder = Path(checkpoint.path)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        try:
            for path in sorted(files, key=lambda path: is_manifest(path.name)):
                stored = f"{name}/{path.relative_to(folder).as_posix()}"
                self._storage.upload(path, stored, lambda _: self._upload_moves.set())
        except UserError as error:
            ray.get(self._mailbox.fail.remote(f"checkpoint {name} could not be kept: {error}"))
            raise
        finally:
            self._upload_done.set()
        place = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(place.build_checkpoint_path_from_name(name), filesystem=place.storage_filesystem)

    def _wait_for_upload(self) -> None:
        """Beats as long as bytes are on their way: a storage that is frozen is a hang like another."""
        self._upload_moves.set()
        while not self._upload_done.wait(1.0):
            if self._upload_moves.is_set():
                self._upload_moves.clear()
                self.beat("waiting for the upload of a checkpoint")

    def _remove_orphans(self, registered: set[str]) -> None:
        """And take note of what stays: a save that is repeated must not be mixed with its first try."""
        for name, sizes in files_by_folder(self._storage).items():
            if name in registered or (not registered and self._is_whole(name, sizes)):
                self._left_over.add(name)
            else:
                self._delete(name)

    def _is_whole(self, name: str, sizes: dict[str, int]) -> bool:
        try:
            stored_manifest(self._storage, name, sizes)
        except CheckpointError:
            return False
        return True

    def _delete(self, name: str) -> None:
        for stored in self._storage.list(f"{name}/"):
            self._storage.delete(stored.path)
        self._left_over.discard(name)


def _named(reported: list[Any], name: str) -> Any:
    """Ray's checkpoint whose folder is `name`."""
    return next(item.checkpoint for item in reported if Path(item.checkpoint.path).name == name)


class RunStopped(Exception):
    """The driver was told to stop, and the last checkpoint is saved."""


def listen_for_sigterm() -> None:
    """Let SIGTERM ask for a last checkpoint; a second one ends the process. To be called on the main thread.

    Clouds send it, or their agents do, some time before they take a machine away.
    """

    def handle(number: int, frame: Any) -> None:
        if _told_to_end.is_set():
            os._exit(128 + number)
        _told_to_end.set()

    signal.signal(signal.SIGTERM, handle)


def _machine_is_drained() -> bool:
    """Whether Ray Train has told this process that a machine of the group is drained (spot notice, scaling down)."""
    # `ray.train.get_preemption_info` tells the same by a collective over all ranks: too dear for each step.
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
