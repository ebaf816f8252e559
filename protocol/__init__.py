"""The contract: what both sides compute bit for bit. numpy only; no I/O, no clock, no ONNX Runtime, no MQTT."""
