"""What runs on a board: numpy, ONNX Runtime and an MQTT client, nothing else."""
