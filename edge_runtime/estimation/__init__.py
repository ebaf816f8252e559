"""Device halves of the estimators and of the saliency: passes in, scalars out."""
