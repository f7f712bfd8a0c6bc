"""The same repository and the same requests to a real Triton and to this server: what the two answer must agree."""
