"""Networks, generators and the registry that names them."""
