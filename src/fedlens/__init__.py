"""fedlens runs federated computations and keeps what every client learned."""

__version__ = "0.1.0"
