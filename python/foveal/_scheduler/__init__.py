"""The scheduler's parts; users import them from foveal or foveal.scheduler."""
