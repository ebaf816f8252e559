"""The way to a broker: TLS, MQTT, what waits to be sent and what arrives."""
