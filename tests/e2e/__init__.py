"""End-to-end tests: real servers in processes of their own, real sockets."""
