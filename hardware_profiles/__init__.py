"""What boards have and what fedzo may use of it: one TOML file a board, and the loader that checks them."""

from __future__ import annotations

from .loader import Profile, list_profiles, load_profile, profile_names

__all__ = ["Profile", "list_profiles", "load_profile", "profile_names"]
