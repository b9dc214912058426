"""A pytest plugin for kombu's own tests: puts our transport where they look for kombu's, before they do."""

import kombu.transport.redis as stock

from worker.transport import channel as transport
from worker.transport import poller as polling
from worker.transport import qos as unacked

stock.QoS = unacked.QoS
stock.Channel = transport.Channel
stock.SentinelChannel = transport.SentinelChannel
stock.MultiChannelPoller = polling.Poller
stock.Transport = transport.Transport
stock.SentinelTransport = transport.SentinelTransport
