"""Real training from a web server, an S3 store and a command: the same, bit for bit, as from the local folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data import shard_server
from tests.data.shard_server import ShardServer, serving
from tests.training import LOSSES, audit, small_config, train, write_config

boto3 = pytest.importorskip("boto3", reason="needs moto[server]")
moto_server = pytest.importorskip("moto.server", reason="needs moto[server]")
pytest.importorskip("s3fs", reason="needs s3fs")

STEPS = {"steps": 14}  # 24 samples each: more than the epoch of 300


@pytest.fixture(scope="module")
def web(folder: Path) -> Iterator[ShardServer]:
    """Has shards 0 and 1; the one is busy at first, the other's connection breaks twice."""
    with serving() as server:
        server.objects |= {f"/{n}.tar": (folder / f"shards/train/{n}.tar").read_bytes() for n in ("00000", "00001")}
        server.answers["/00000.tar"] = [shard_server.status(503)]
        server.answers["/00001.tar"] = [shard_server.cut_after(9_000), shard_server.closed_after(20_000)]
        yield server


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[str]:
    """An S3 store with shards 2 and 3, named by the environment. Buckets outlive their server in this process."""
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="training")
        for name in ("00002.tar", "00003.tar"):
            client.put_object(Bucket="training", Key=f"train/{name}", Body=(folder / "shards/train" / name).read_bytes())
        yield "s3://training/train/"
        server.stop()


def test_shards_from_the_web_a_store_and_a_command_train_the_same_model(folder: Path, web: ShardServer, store: str) -> None:
    log = folder / "commands.log"
    data = {
        "train": f"{web.url}/{{00000..00001}}.tar::{store}::pipe:echo again >> {log}; cat shards/train/00004.tar",
        "cache": str(folder / "cache"),
        "workers": 1,
    }
    write_config(folder, small_config(train=STEPS), "local.yaml")
    write_config(folder, small_config(train=STEPS, data=data), "remote.yaml")
    local = train(folder, "local", 2, config="local.yaml")
    remote = train(folder, "remote", 2, config="remote.yaml")
    assert [[row[key] for key in LOSSES] for row in remote] == [[row[key] for key in LOSSES] for row in local]
    assert audit(folder / "runs/remote") == audit(folder / "runs/local")
    assert {name.partition("#")[0] for _, _, name in audit(folder / "runs/remote")} == {f"0000{n}.tar" for n in range(5)}
    # one download of each shard, for two ranks with a worker each, and what went wrong on the way
    reading = sum((Counter(row["reading"]) for row in remote), Counter())
    assert (reading["downloads"], reading["retries"]) == (5, 3)
    assert Counter(path for path, _ in web.asked) == {"/00000.tar": 2, "/00001.tar": 3}
    ranges = [asked for path, asked in web.asked if path == "/00001.tar"]
    assert ranges[0] is None and ranges[-1] is not None, "the last try went on at its byte"
    assert log.read_text() == "again\n"
    assert reading["received"] == sum(path.stat().st_size for path in (folder / "shards/train").glob("*.tar"))
    assert remote[-1]["lost"] == local[-1]["lost"] == 0
