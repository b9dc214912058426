"""A pytest plugin for kombu's own tests: replaces kombu's Redis transport by ours before they import it."""

import kombu.transport.redis as stock

from worker.transport.channel import Channel, SentinelChannel, SentinelTransport, Transport
from worker.transport.poller import Poller
from worker.transport.qos import QoS

stock.QoS = QoS
stock.Channel = Channel
stock.SentinelChannel = SentinelChannel
stock.MultiChannelPoller = Poller
stock.Transport = Transport
stock.SentinelTransport = SentinelTransport
