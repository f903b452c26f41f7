"""Rooms made from a seed, with everything about them known exactly: colour, depth, normals, instances, cameras, surface points."""
from .cast import CEILING, FLOOR, SOLIDS, WALLS, Room, RoomViews, Solid, Texture
from .endless import Sample, close_cameras, endless_room, plain_pixels, ring_cameras, sample, samples
from .furnished import make_room, orbit
from .written import write_capture, write_rooms

__all__ = ["CEILING", "FLOOR", "SOLIDS", "WALLS", "Room", "RoomViews", "Sample", "Solid", "Texture", "close_cameras", "endless_room", "make_room", "orbit", "plain_pixels",
           "ring_cameras", "sample", "samples", "write_capture", "write_rooms"]
