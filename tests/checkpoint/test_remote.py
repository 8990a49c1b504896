"""Checkpoints in a real S3 server: moto's, over the network, through s3fs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.checkpoint.folders import checkpoint_name, checkpoints_of, delete, incomplete_path, publish
from megamoe.checkpoint.manifest import MANIFEST, Manifest, StoredTensor, write_manifest
from megamoe.checkpoint.mirror import Mirror
from megamoe.checkpoint.remote import RemoteCheckpoints
from megamoe.checkpoint.tensorfile import write_tensors
from megamoe.config.training import CheckpointConfig
from megamoe.core.errors import CheckpointError, DamagedCheckpoint
from tests.training import largest_difference, make_data, metrics, small_config, train, write_config

s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
boto3 = pytest.importorskip("boto3", reason="needs moto[server]")
moto_server = pytest.importorskip("moto.server", reason="needs moto[server]")

URL = "s3://runs/team/one"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the server, with an empty bucket ``runs``; the environment names the server, as users would."""
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()  # it remembers the server of another test
    client = boto3.client("s3")
    client.create_bucket(Bucket="runs")
    for stored in client.list_objects_v2(Bucket="runs").get("Contents", []):
        client.delete_object(Bucket="runs", Key=stored["Key"])
    return client


def make_checkpoint(run: Path, step: int, seed: int = 0) -> Path:
    """A checkpoint of two files, complete in all but what its state says."""
    folder = run / "checkpoints" / checkpoint_name(step)
    into = incomplete_path(folder)
    into.mkdir(parents=True)
    torch.manual_seed(step + seed)
    files, tensors = {}, {}
    for rank in range(2):
        name, file = f"weight/{rank}", f"rank-{rank:05d}.safetensors"
        files[file] = write_tensors(into / file, {f"{name}@0": torch.randn(3000)})
        tensors[name] = StoredTensor(3000, "float32", ((0, 3000, file),))
    write_manifest(into, Manifest("2026-01-01T00:00:00+00:00", "two ranks", "model", {"step": step}, files, tensors))
    publish(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_put_comes_back_byte_for_byte(client: Any, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "here", 100)
    store = RemoteCheckpoints(URL)
    assert store.steps() == []
    store.put(folder)
    store.put(folder)
    assert store.steps() == [100]
    fetched = store.fetch(100, tmp_path / "there")
    assert contents(fetched) == contents(folder)
    assert checkpoints_of(tmp_path / "there") == [(100, fetched)]


def test_without_its_manifest_it_is_not_there(client: Any, tmp_path: Path) -> None:
    store = RemoteCheckpoints(URL)
    store.put(make_checkpoint(tmp_path, 100))
    client.delete_object(Bucket="runs", Key=f"team/one/step-00000100/{MANIFEST}")
    assert store.steps() == []
    with pytest.raises(DamagedCheckpoint, match="has no manifest"):
        store.fetch(100, tmp_path / "there")


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_object_is_named_and_not_published(damage: str, client: Any, tmp_path: Path) -> None:
    store = RemoteCheckpoints(URL)
    folder = make_checkpoint(tmp_path / "here", 100)
    store.put(folder)
    key = "team/one/step-00000100/rank-00001.safetensors"
    data = bytearray((folder / "rank-00001.safetensors").read_bytes())
    if damage == "flipped":
        data[-5] ^= 1
    client.delete_object(Bucket="runs", Key=key)
    if damage != "missing":
        client.put_object(Bucket="runs", Key=key, Body=bytes(data[:-9] if damage == "cut" else data))
    with pytest.raises(CheckpointError, match=r"rank-00001|cannot be read"):
        store.fetch(100, tmp_path / "there")
    assert checkpoints_of(tmp_path / "there") == []


def test_another_one_of_the_same_step_takes_its_place(client: Any, tmp_path: Path) -> None:
    store = RemoteCheckpoints(URL)
    store.put(make_checkpoint(tmp_path / "old", 100))
    new = make_checkpoint(tmp_path / "new", 100, seed=1)
    store.put(new)
    assert contents(store.fetch(100, tmp_path / "there")) == contents(new)


def test_an_abandoned_one_is_not_found_but_kept(client: Any, tmp_path: Path) -> None:
    store = RemoteCheckpoints(URL)
    for step in (100, 200):
        store.put(make_checkpoint(tmp_path, step))
    store.abandon(200)
    assert store.steps() == [100]
    kept = {
        stored["Key"].rpartition("/")[2]
        for stored in client.list_objects_v2(Bucket="runs", Prefix="team/one/step-00000200/")["Contents"]
    }
    assert kept == {"abandoned-manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"}


def test_the_mirror_keeps_what_the_run_keeps_and_makes_good_what_is_missing(client: Any, tmp_path: Path) -> None:
    settings = CheckpointConfig(keep=2, keep_every=500)
    for step in (500, 600, 700):
        make_checkpoint(tmp_path, step)
    mirror = Mirror(RemoteCheckpoints(URL), tmp_path, settings)
    mirror.changed()
    make_checkpoint(tmp_path, 800)
    delete(tmp_path / "checkpoints/step-00000600")
    mirror.finish()
    assert RemoteCheckpoints(URL).steps() == [500, 700, 800]


def test_a_store_that_is_gone_is_said_and_fails_the_end_of_the_run_only(
    client: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path, 100)
    mirror = Mirror(RemoteCheckpoints("s3://no-such-bucket/one"), tmp_path, CheckpointConfig())
    mirror.changed()
    with pytest.raises(CheckpointError, match=r"checkpoint.mirror s3://no-such-bucket/one: cannot be .* check address"):
        mirror.finish()
    assert "the local checkpoints are whole" in capsys.readouterr().err
    assert len(checkpoints_of(tmp_path)) == 1


def test_a_manifest_of_a_stranger_cannot_name_files_elsewhere(client: Any, tmp_path: Path) -> None:
    store = RemoteCheckpoints(URL)
    folder = make_checkpoint(tmp_path / "here", 100)
    text = (folder / MANIFEST).read_text().replace("rank-00001.safetensors", "../../../../evil.safetensors")
    store.put(folder)
    client.put_object(Bucket="runs", Key=f"team/one/step-00000100/{MANIFEST}", Body=text.encode())
    with pytest.raises(DamagedCheckpoint):
        store.fetch(100, tmp_path / "there")
    assert not list(tmp_path.rglob("evil*"))


def test_a_folder_is_a_store_too(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "here", 100)
    store = RemoteCheckpoints(str(tmp_path / "mirror"))
    store.put(folder)
    assert store.steps() == [100]
    assert contents(store.fetch(100, tmp_path / "there")) == contents(folder)
    store.delete(100)
    assert store.steps() == []


@pytest.mark.parametrize("url", ["nowhere://bucket/one", "gs2://x"])
def test_an_unknown_store_is_one_line(url: str) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint.mirror .*give a folder"):
        RemoteCheckpoints(url)


def test_a_run_goes_on_elsewhere_from_its_mirror_as_if_nothing_had_happened(client: Any, tmp_path: Path) -> None:
    make_data(tmp_path)
    write_config(tmp_path, small_config(checkpoint={"every": 5, "mirror": URL}))
    whole = train(tmp_path, "one", 2, ["parallel.expert=2", "checkpoint.async=true"])
    assert RemoteCheckpoints(URL).steps() == [5, 10]
    RemoteCheckpoints(URL).abandon(10)
    shutil.move(tmp_path / "runs/one", tmp_path / "lost")
    assert train(tmp_path, "one", 2, ["parallel.pipeline=2"], resume="auto")[-1]["step"] == 10
    rows = metrics(tmp_path / "runs/one")
    assert largest_difference(whole[5:], rows)[0] < 1e-5
    assert RemoteCheckpoints(URL).steps() == [5, 10]
    with pytest.raises(AssertionError, match=r"has checkpoints of a run, the newest of step 10; go on with it by"):
        train(tmp_path, "another", 1)
