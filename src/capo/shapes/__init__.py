"""The shapes world: rendered, captioned shapes, base models, learned rewards and an exact oracle."""
