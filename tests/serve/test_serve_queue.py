"""The queue on disk: fair, bounded, and nothing of it lost or done twice when the process ends."""

from pathlib import Path
from typing import Any

import pytest

from onestepsr.core.errors import UserError
from onestepsr.serve.jobs import MOST_ATTEMPTS, Job, Queue, QueueFull

OPTIONS: dict[str, Any] = {"model": "m", "format": "png", "scale": 4.0, "width": None, "height": None}


def add(queue: Queue, client: str = "a", *, awaited: bool = False) -> Job:
    return queue.add(client=client, name=f"{client}.png", options=OPTIONS, size=(8, 4), data=b"x", awaited=awaited)


def taken(queue: Queue) -> Job:
    job = queue.take(0)
    assert job is not None
    return job


def test_clients_have_their_turns(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    for _ in range(4):
        add(queue, "many")
    assert taken(queue).client == "many"
    add(queue, "few")
    add(queue, "few")
    add(queue, "late")
    order = [taken(queue).client for _ in range(6)]
    assert order == ["many", "few", "late", "many", "few", "many"]


def test_a_client_who_comes_back_has_no_credit(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    for _ in range(5):
        add(queue, "a")
        taken(queue)
    add(queue, "a")
    add(queue, "b")
    assert [taken(queue).client for _ in range(2)] == ["a", "b"]


def test_the_queue_is_bounded_in_all_and_for_each_client(tmp_path: Path) -> None:
    queue = Queue(tmp_path, most_queued=4)
    for client in ("a", "a", "b"):
        add(queue, client)
    with pytest.raises(QueueFull, match="2 images of yours are waiting"):
        add(queue, "a")
    add(queue, "b")
    with pytest.raises(QueueFull, match="4 images are waiting") as refused:
        add(queue, "c")
    assert 1 <= refused.value.retry_after <= 600
    assert len(list(queue.files.iterdir())) == 4


def test_jobs_outlive_the_process(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    running, waiting, done = add(queue), add(queue, "b"), add(queue, "c")
    for job in (taken(queue), taken(queue), taken(queue)):
        if job.id == done.id:
            queue.result(job.id).write_bytes(b"result")
            assert queue.finish(job, size=(32, 16), nbytes=6, seconds=1.0)
    del waiting
    again = Queue(tmp_path)  # the first one was never closed
    assert [taken(again).client for _ in range(2)] == ["a", "b"]
    assert taken_ids(again) == []
    kept = again.get(done.id)
    assert kept is not None
    assert (kept.state, kept.output_width, kept.nbytes) == ("done", 32, 6)
    assert again.result(done.id).read_bytes() == b"result"
    assert again.get(running.id) is not None


def taken_ids(queue: Queue) -> list[str]:
    found = []
    while (job := queue.take(0)) is not None:
        found.append(job.id)
    return found


def test_an_image_that_kills_the_server_is_given_up(tmp_path: Path) -> None:
    job = add(Queue(tmp_path))
    for _ in range(MOST_ATTEMPTS):
        assert taken(Queue(tmp_path)).id == job.id
    queue = Queue(tmp_path)
    assert queue.take(0) is None
    failed = queue.get(job.id)
    assert failed is not None
    assert (failed.state, failed.error_code) == ("failed", "crash")


def test_ending_in_good_order_is_no_attempt(tmp_path: Path) -> None:
    job = add(Queue(tmp_path))
    for _ in range(2 * MOST_ATTEMPTS):
        queue = Queue(tmp_path)
        assert taken(queue).attempts == 1
        queue.put_back(job)
        queue.close()


def test_files_of_no_job_are_removed_and_nobody_waits_for_an_awaited_job(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    kept, awaited = add(queue), add(queue, awaited=True)
    (queue.files / ".onestepsr-partial-0123-456").write_bytes(b"half")
    (queue.files / f"{'x' * 24}.in").write_bytes(b"orphan")
    again = Queue(tmp_path)
    assert [path.name for path in again.files.iterdir()] == [f"{kept.id}.in"]
    assert again.get(awaited.id) is None


def test_a_cancelled_job_leaves_no_result(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    add(queue)
    job = taken(queue)
    cancelled = queue.cancel(job.id)
    assert cancelled is not None
    assert cancelled.state == "cancelled"
    assert not queue.is_wanted(job)
    queue.result(job.id).write_bytes(b"late")
    assert not queue.finish(job, size=(1, 1), nbytes=4, seconds=1.0)
    assert not queue.result(job.id).exists()
    assert queue.delete(job.id)
    assert list(queue.files.iterdir()) == []
    assert not queue.delete(job.id)


def test_results_expire(tmp_path: Path) -> None:
    queue = Queue(tmp_path, keep_seconds=-1.0)
    add(queue, "a")
    add(queue, "b")
    job = taken(queue)
    queue.result(job.id).write_bytes(b"x")
    queue.finish(job, size=(1, 1), nbytes=1, seconds=0.1)
    assert queue.expire() == 1
    assert queue.get(job.id) is None
    assert len(list(queue.files.iterdir())) == 1  # that of the job that waits


def test_a_failure_to_write_leaves_nothing(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    queue.close()
    with pytest.raises(Exception, match="closed"):
        add(queue)
    assert list(queue.files.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used as data folder"):
        Queue(tmp_path / "file")


def test_files_and_modes_of_others_are_left_alone(tmp_path: Path) -> None:
    own = tmp_path / "files" / "holiday.jpg"
    own.parent.mkdir(mode=0o755)
    own.write_bytes(b"mine")
    Queue(tmp_path).close()
    assert own.read_bytes() == b"mine"
    assert own.parent.stat().st_mode & 0o777 == 0o755
