"""Checks of everything around the service against real parts: image, monitoring, rollout."""
