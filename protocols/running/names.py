"""What the protocols are called, and where each one's `Backend` lies; imports none of them."""

PROTOCOLS = {"fss": "protocols.running.fss", "crypten": "protocols.running.with_crypten"}
