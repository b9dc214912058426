"""Every private member of kombu, redis-py and Celery that we lean on: a new release of them fails here first."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import kombu.transport
import pytest
from celery.worker import request, state
from kombu.transport import redis as stock
from kombu.transport.virtual import base
from redis.connection import AbstractConnection

from worker.transport import channel as transport
from worker.transport import fetching, scripts
from worker.transport import poller as polling
from worker.transport import qos as unacked

#: Methods that we override or call, with the parameters we count on.
METHODS = {
    stock.Channel: {
        "__init__": "self *args **kwargs",
        "_brpop_start": "self timeout",
        "_brpop_read": "self **options",
        "_flush_brpop_reauth": "self",
        "_handle_message": "self client r",
        "_deliver_fanout_message": "self message exchange",
        "_q_for_pri": "self queue pri",
        "_get": "self queue",
        "_queue_bind": "self exchange routing_key pattern queue",
        "_size": "self queue",
        "_purge": "self queue",
        "_maybe_update_queues_expire": "self client queue",
        "_disconnect_pools": "self",
        "_close_clients": "self",
        "_on_connection_disconnect": "self connection",
        "basic_consume": "self queue *args **kwargs",
        "close": "self",
        "conn_or_acquire": "self client",
    },
    base.Channel: {
        "basic_consume": "self queue no_ack callback consumer_tag **kwargs",
        "basic_get": "self queue no_ack **kwargs",
        "basic_ack": "self delivery_tag multiple",
        "basic_reject": "self delivery_tag requeue",
        "message_to_python": "self raw_message",
        "close": "self",
    },
    base.Message: {"__init__": "self payload channel **kwargs"},
    stock.QoS: {
        "append": "self message delivery_tag",
        "ack": "self delivery_tag",
        "reject": "self delivery_tag requeue",
        "restore_by_tag": "self tag client leftmost",
        "restore_unacked": "self client",
        "restore_visible": "self start num interval",
    },
    base.QoS: {
        "__init__": "self channel prefetch_count",
        "append": "self message delivery_tag",
        "can_consume": "self",
        "can_consume_max_estimate": "self",
        "restore_unacked_once": "self stderr",
        "_flush": "self",
    },
    stock.MultiChannelPoller: {
        "on_poll_init": "self poller",
        "on_poll_start": "self",
        "on_readable": "self fileno",
        "get": "self callback timeout",
        "maybe_restore_messages": "self",
        "_update_brpop_polling": "self",
    },
    stock.Transport: {"__init__": "self *args **kwargs", "register_with_event_loop": "self connection loop"},
    AbstractConnection: {
        "pack_commands": "self commands",
        "send_packed_command": "self command check_health",
        "disconnect": "self *args **kwargs",
    },
}

#: Attributes of a channel, its QoS, its poller and its transport that we read or set.
CHANNEL = (
    "_closing _in_poll _brpop_sent_at _queue_cycle _qos _expires active_queues brpop_timeout closed connection "
    "connection_errors global_keyprefix handlers keyprefix_queue priority_steps sep unacked_index_key unacked_key "
    "unacked_restore_interval unacked_restore_throttle visibility_timeout do_restore"
)
QOS = "_delivered _dirty _quick_ack _on_collect prefetch_count restore_at_shutdown unacked_key visibility_timeout"
POLLER = "_channels _fd_to_chan _chan_to_sock poller"
TRANSPORT = "_callbacks cycle client channels state"


def parameters(method):
    star = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return " ".join(star.get(it.kind, "") + it.name for it in inspect.signature(method).parameters.values())


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [(owner, name, expected) for owner, methods in METHODS.items() for name, expected in methods.items()],
    ids=[f"{owner.__module__}.{owner.__name__}.{name}" for owner, methods in METHODS.items() for name in methods],
)
def test_a_method_we_lean_on_is_there_with_its_parameters(owner, name, expected):
    assert name in vars(owner), "it has moved to another class, or is gone"
    method = inspect.unwrap(getattr(owner, name))
    assert parameters(method) == expected


def test_kombu_is_the_release_this_was_written_for():
    assert version("kombu").split(".")[:2] == ["5", "7"]


def test_a_live_channel_has_what_we_read(broker_url):
    with kombu.Connection(broker_url, transport="kombu.transport.redis:Transport") as connection:
        channel = connection.default_channel
        owners = {
            channel: CHANNEL,
            channel.qos: QOS,
            connection.transport.cycle: POLLER,
            connection.transport: TRANSPORT,
        }
        for owner, names in owners.items():
            assert [name for name in names.split() if not hasattr(owner, name)] == []
        assert channel.qos._delivered.restored is False
        assert channel.handlers.keys() == {"BRPOP", "LISTEN"}
        assert isinstance(connection.transport.cycle, stock.MultiChannelPoller)


def test_kombu_still_writes_the_keys_and_records_that_we_share(broker_url):
    channel, queue = stock.Channel, base.QoS
    assert (channel.unacked_key, channel.unacked_index_key) == ("unacked", "unacked_index")
    assert (channel.sep, channel.keyprefix_queue) == ("\x06\x16", "_kombu.binding.%s")
    assert channel.priority_steps == [0, 3, 6, 9]
    assert "dumps([message._raw, EX, RK])" in inspect.getsource(stock.QoS.append)
    assert "M, EX, RK = loads(bytes_to_str(p))" in inspect.getsource(stock.QoS.restore_by_tag)
    assert queue.restore_at_shutdown


def test_kombu_still_looks_transports_up_where_we_register():
    names = ("redis", "rediss", "sentinel")
    assert set(names) <= kombu.transport.TRANSPORT_ALIASES.keys()
    assert isinstance(kombu.transport._transport_cache, dict)


def test_kombus_redis_still_prefixes_the_first_key_of_a_script_only():
    assert stock.GlobalKeyPrefixMixin.PREFIXED_COMPLEX_COMMANDS["EVALSHA"] == {"args_start": 2, "args_end": 3}


def test_we_add_no_name_that_kombu_uses_for_something_else():
    """A method of ours that happened to be called like an attribute of kombu's would break it silently."""
    ours = {
        stock.Channel: (scripts.ScriptedChannel, fetching.FetchingChannel, transport.Channel),
        stock.QoS: (unacked.QoS,),
        stock.MultiChannelPoller: (polling.Poller,),
    }
    meant = {"QoS", "from_transport_options", "Channel"} | {name for methods in METHODS.values() for name in methods}
    for theirs, classes in ours.items():
        source = inspect.getsource(stock) + inspect.getsource(base)
        for each in classes:
            added = {name for name in vars(each) if not name.startswith("__")} - meant
            inherited = {name for name in added if hasattr(theirs, name) or f"self.{name} =" in source}
            assert inherited == set(), each


def test_a_request_can_be_accepted_without_being_active():
    """As `Intake.finish` does it; the rest is what Celery's own does."""
    assert "add_active_request" in inspect.signature(state.task_accepted).parameters
    source = inspect.getsource(request.Request.on_accepted)
    assert "task_accepted(self)" in source
    assert "self.send_event('task-started')" in source
