"""From a model to the artifact that servers and boards run."""
