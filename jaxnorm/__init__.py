"""BatchNorm over replicas: exact statistics across devices, PyTorch's conventions, and the tools to train with them."""
