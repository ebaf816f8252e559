"""MQTT brokers that a server can use: a managed Mosquitto, an embedded amqtt, or somebody else's.

The broker never holds the truth. Whatever it forgets (retained messages, queues), the server publishes again and the
devices resend, so all of them may be restarted at any time.
"""

from .base import Broker
from .choose import open_broker
from .credentials import Credentials, Login

__all__ = ["Broker", "Credentials", "Login", "open_broker"]
