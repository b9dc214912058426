"""kombu's own tests of its Redis transport pass on ours, except for those listed here with the reason.

They are in kombu's source distribution, which pip downloads. Without a network they are skipped, or fail if CI=true.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.kit.servers import Broker

pytestmark = pytest.mark.network

HERE = Path(__file__).parent
UNIT, LIVE = "t/unit/transport/test_redis.py", "t/integration/test_redis.py"

#: The download is executed: it has to be these bytes.
SHA256 = {"5.7.0": "31e62fdfd2381caa3422f8e02b84a491d9a2180ddda74507b57f4cb1e1c2c2c9"}

#: Reason → tests that do not apply for it.
NOT_APPLICABLE = {
    "their Redis is a fake that knows BRPOP, RPOP and HSET, but neither scripts nor packed commands; our scripts "
    "run on a real one in the other modules here": [
        "test_Channel::test_delivery_tag_is_uuid",
        "test_Channel::test_brpop_start_records_send_time",
        "test_Channel::test_brpop_health_drop_resets_in_poll",
        "test_Redis::test_publish__get_redispyv3",
        "test_Redis::test_publish__get_redispyv2",
        "test_Redis::test_publish__consume",
        "test_Redis::test_get__Empty",
    ],
    "they assert the very commands that ours replaces by a script (BRPOP; WATCH, HGET, MULTI; ZRANGE under a mutex)": [
        "test_Channel::test_brpop_start_sends_keys_and_timeout",
        "test_Channel::test_brpop_start_prefixes_keys",
        "test_Channel::test_restore_by_tag_keeps_unacked_message_on_connection_error",
        "test_Channel::test_restore_by_tag_requeues_when_lookup_succeeds",
        "test_Channel::test_qos_restore_visible",
        "test_Channel::test_qos_restore_visible_interval_throttles",
        "test_Channel::test_qos_restore_visible_zero_interval_no_zerodivision",
        "test_Channel::test_qos_restore_visible_uses_zrange_byscore_rev",
        "test_Channel::test_qos_restore_visible_without_limit",
        "test_Channel::test_global_keyprefix_transaction",
        "test_Channel::test_global_keyprefix_restore_visible",
        "test_MultiChannelPoller::test_qos_reject",
    ],
    "it broadcasts a message without delivery tag, which would end Celery; ours drops it with a warning": [
        "test_SentinelChannel_fanout_compat::test_messages_without_delivery_tag_are_not_deduplicated",
    ],
    "they put a Mock in the place of a channel or a connection, and ours compares numbers with its answers": [
        "test_Channel::test_redis_on_disconnect_channel_only_if_was_registered",
        "test_MultiChannelPoller::test_get_no_actions",
        "test_MultiChannelPoller::test_get_brpop_qos_allow",
        "test_MultiChannelPoller::test_get_brpop_qos_disallow",
        "test_MultiChannelPoller::test_get_runs_after_read_callbacks",
        "test_MultiChannelPoller::test_get_refreshes_binding_expiry_while_qos_disallows",
        "test_MultiChannelPoller::test_get_listen",
        "test_MultiChannelPoller::test_get_receives_ERR",
        "test_MultiChannelPoller::test_get_receives_multiple",
        "test_MultiChannelPoller::test_get_checks_brpop_health_when_idle",
        "test_MultiChannelPoller::test_get_skips_brpop_health_on_events",
    ],
    "ours reads a reply even if prefetch is used up: its messages are in flight, and need heartbeats": [
        "test_PausedBRPOP",
        "test_MultiChannelPoller::test_handle_event",
        "test_MultiChannelPoller::test_on_readable_keeps_connection",
    ],
    "they rely on one message per drain_events; ours delivers all messages of a fetch": [
        "test_RedisPriority::test_publish_consume",
        "test_RedisPriority::test_publish_requeue_consume",
        "test_RedisQueueExpiration::test_expiration_gets_reset_on_get",
    ],
    "ours requeues a message byte for byte; only a restored message has the header `redelivered`": [
        "test_RedisRestoreBindingLookupFailure::test_requeue_requeues_message",
        "test_RedisRestoreAtShutdown::test_unacked_message_requeued_on_connection_close",
    ],
    "they make SMEMBERS fail between two commands of a restore; ours is one script": [
        "test_RedisRestoreBindingLookupFailure::test_failed_requeue_keeps_message_unacked",
        "test_RedisRestoreBindingLookupFailure::test_failed_restore_visible_keeps_message_unacked",
    ],
    "an idle channel polls its lists forty times a second, and gets a timeout from a silent connection, which "
    "kombu notices 26 seconds later": [
        "test_RedisBrpopHealthCheck::test_half_open_connection_dropped_and_consumption_resumes",
        "test_RedisBrpopHealthCheck::test_half_open_connection_dropped_by_drain_events",
        "test_RedisBrpopHealthCheck::test_live_connection_with_unread_reply_not_dropped",
    ],
}

#: Each runs in a process of its own, at the same time: they mostly sleep. Most live tests are there twice, once for
#: a connection without options ("None").
EXPIRATION = f"{LIVE}::test_RedisQueueExpiration"
SHARDS = {
    "with a fake Redis": [UNIT],
    "queue expiration": [EXPIRATION, "-k", "None"],
    "queue expiration, with options": [EXPIRATION, "-k", "not None"],
    "everything else": [LIVE, f"--deselect={EXPIRATION}", "-k", "None"],
    "everything else, with options": [LIVE, f"--deselect={EXPIRATION}", "-k", "not None"],
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    """The unpacked tests of the kombu that is installed."""
    release = version("kombu")
    folder = tmp_path_factory.mktemp("kombu")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "kombu", "--dest", str(folder), f"kombu=={release}"]
    download = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    archives = list(folder.glob("kombu-*.tar.gz"))
    if not archives:
        reason = f"pip could not download kombu's source: {download.stderr.strip()[-300:]}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    assert hashlib.sha256(archives[0].read_bytes()).hexdigest() == SHA256[release]
    with tarfile.open(archives[0]) as archive:
        members = [each for each in archive if each.name.startswith(f"kombu-{release}/t/")]
        archive.extractall(folder, members, filter="data")
    return folder / f"kombu-{release}"


def run(suite: Path, arguments: list[str], broker: Broker) -> subprocess.CompletedProcess[str]:
    refused = [name for names in NOT_APPLICABLE.values() for name in names]
    deselect = [f"--deselect={path}::{name}" for path in (UNIT, LIVE) for name in refused]
    (suite / "pytest.ini").write_text("[pytest]\npython_classes = test_*\n")
    plugins = ["-p", "no:valkey", "-p", "no:cacheprovider", "-p", "kombu_suite_plugin"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "ignore", *plugins, *arguments, *deselect],
        cwd=suite,
        env=os.environ
        | {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}", "REDIS_HOST": "127.0.0.1", "REDIS_6379_TCP": str(broker.port)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def runs(suite, tmp_path_factory):
    folder = tmp_path_factory.mktemp("brokers")
    with ThreadPoolExecutor(len(SHARDS)) as pool:

        def one(number: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
            with Broker(folder / str(number)) as broker:
                return run(suite, arguments, broker)

        futures = {name: pool.submit(one, number, each) for number, (name, each) in enumerate(SHARDS.items())}
        return {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("shard", SHARDS)
def test_kombus_own_tests_pass_on_our_transport(runs, shard):
    result = runs[shard]
    summary = result.stdout.strip().splitlines()[-1]
    print(f"{shard}: {summary}")
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", summary)[1]) > 10


def test_every_test_that_does_not_apply_is_still_there(suite):
    source = (suite / UNIT).read_text() + (suite / LIVE).read_text()
    for names in NOT_APPLICABLE.values():
        for name in names:
            for part in name.split("::"):
                assert re.search(rf"(class|def) {part}\b", source), f"{name} is gone: take it off the list"
