"""."""
RAYTX_API = 1
