"""Real-ESRGAN: the network and its published weights."""
