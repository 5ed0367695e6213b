"""What is not about language models: devices, memory, files, the hub, progress, stopping, the environment."""
