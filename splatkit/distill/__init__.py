"""Teaching a 2D vision backbone 3D: features of two photos, carried by Gaussians into a third, are what the student must see there.

After "Splat and Distill" (Shavin and Benaim, ICLR 2026). Every departure from the paper is a setting with a name in config.py, and
configs/distill/faithful.yaml has them all as the paper and its code have them.
"""
