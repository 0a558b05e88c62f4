"""The version: read by pip when it installs the package, and there as well where it is not installed."""

VERSION = "0.1.0"
