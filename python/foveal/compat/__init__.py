"""foveal behind other libraries' names: ``foveal.compat.torch`` and ``foveal.compat.flash_attn``."""
