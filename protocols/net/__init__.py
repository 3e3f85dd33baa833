"""Connections between roles: mutual TLS, frames, links, heartbeats; no arithmetic."""
