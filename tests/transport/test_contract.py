"""Every private member of kombu, redis-py and Celery that the worker relies on: a new release fails here first."""

from __future__ import annotations

import ast
import inspect
from importlib.metadata import version

import kombu.transport
import pytest
from celery.worker import request, state
from kombu.transport import redis as stock
from kombu.transport.virtual import base
from redis.connection import AbstractConnection

from tests.kit import consumer
from worker import transport
from worker.transport import channel, fetcher, poller, qos

#: Methods that are overridden or called, with the parameters that this relies on.
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

#: Attributes that are read or set.
CHANNEL = (
    "_closing _in_poll _brpop_sent_at _queue_cycle _qos active_queues brpop_timeout client closed connection "
    "connection_errors do_restore global_keyprefix handlers keyprefix_queue priority_steps sep unacked_index_key "
    "unacked_key unacked_restore_interval unacked_restore_throttle visibility_timeout"
)
QOS = "_delivered _dirty _quick_ack _on_collect _vrestore_count prefetch_count restore_at_shutdown unacked_key"
POLLER = "_channels _fd_to_chan"
TRANSPORT = "_callbacks cycle client"
CONNECTION = "alt hostname port virtual_host transport_options"
MESSAGE = "errors headers delivery_tag"
ATTRIBUTES = f"{CHANNEL} {QOS} {POLLER} {TRANSPORT} {CONNECTION} {MESSAGE}".split()


def parameters(method):
    star = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return " ".join(star.get(it.kind, "") + it.name for it in inspect.signature(method).parameters.values())


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [(owner, name, expected) for owner, methods in METHODS.items() for name, expected in methods.items()],
    ids=[f"{owner.__module__}.{owner.__name__}.{name}" for owner, methods in METHODS.items() for name in methods],
)
def test_a_method_that_we_rely_on_is_there_with_its_parameters(owner, name, expected):
    assert name in vars(owner), "it has moved to another class, or is gone"
    method = inspect.unwrap(getattr(owner, name))
    assert parameters(method) == expected


def test_kombu_is_the_release_this_was_written_for():
    assert version("kombu").split(".")[:2] == ["5", "7"]


def test_a_live_channel_has_the_attributes_that_we_rely_on(broker_url):
    with kombu.Connection(broker_url, transport="kombu.transport.redis:Transport") as connection:
        live = connection.default_channel
        owners = {
            live: CHANNEL,
            live.qos: QOS,
            connection.transport.cycle: POLLER,
            connection.transport: TRANSPORT,
            connection: CONNECTION,
            live.Message({"properties": {"delivery_tag": "t"}}, channel=live): MESSAGE,
        }
        for owner, names in owners.items():
            assert [name for name in names.split() if not hasattr(owner, name)] == []
        assert live.qos._delivered.restored is False
        assert live.handlers.keys() == {"BRPOP", "LISTEN"}
        assert isinstance(connection.transport.cycle, stock.MultiChannelPoller)


def test_every_private_member_that_is_used_is_listed_here_and_no_other():
    sources = [ast.parse(inspect.getsource(module)) for module in (channel, fetcher, poller, qos, transport, consumer)]
    nodes = [node for source in sources for node in ast.walk(source)]
    ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    ours |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)} | ours
    methods = {name for owner in METHODS.values() for name in owner}
    listed = {name for name in {*ATTRIBUTES, *methods} if name.startswith("_") and not name.startswith("__")}
    private = {name for name in used - ours if name.startswith("_") and not name.startswith("__")}
    assert private - listed == {"_transport_cache"}, "not listed"
    assert listed - used == set(), "listed, and not used any more"


def test_kombu_still_writes_the_keys_and_records_that_we_share():
    kombus = stock.Channel
    assert (kombus.unacked_key, kombus.unacked_index_key) == ("unacked", "unacked_index")
    assert (kombus.sep, kombus.keyprefix_queue) == ("\x06\x16", "_kombu.binding.%s")
    assert kombus.priority_steps == [0, 3, 6, 9]
    assert "dumps([message._raw, EX, RK])" in inspect.getsource(stock.QoS.append)
    assert "M, EX, RK = loads(bytes_to_str(p))" in inspect.getsource(stock.QoS.restore_by_tag)
    assert stock.QoS.restore_at_shutdown


def test_kombu_still_looks_up_transports_where_we_register_ours():
    names = ("redis", "rediss", "sentinel")
    assert set(names) <= kombu.transport.TRANSPORT_ALIASES.keys()
    assert isinstance(kombu.transport._transport_cache, dict)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (stock.Channel, channel.Channel),
        (stock.QoS, qos.QoS),
        (stock.MultiChannelPoller, poller.Poller),
        (stock.Transport, channel.Transport),
    ],
)
def test_no_name_that_we_add_is_one_of_kombus(theirs, ours):
    """A method with the name of one of kombu's attributes would break it silently."""
    meant = {"QoS", "from_transport_options", "Channel", "brpop_timeout"}
    meant |= {name for methods in METHODS.values() for name in methods}
    nodes = ast.walk(ast.parse(inspect.getsource(ours)))
    stored = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    added = {name for name in {*vars(ours), *stored} if not name.startswith("__")} - meant - set(ATTRIBUTES)
    source = inspect.getsource(stock) + inspect.getsource(base)
    assert {name for name in added if hasattr(theirs, name) or f"self.{name} =" in source} == set()


def test_a_request_can_be_accepted_without_being_active():
    """As `Intake.finish` does it; the rest is what Celery's own does."""
    assert "add_active_request" in inspect.signature(state.task_accepted).parameters
    source = inspect.getsource(request.Request.on_accepted)
    assert "task_accepted(self)" in source
    assert "self.send_event('task-started')" in source
