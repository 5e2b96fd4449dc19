"""The whole path at laptop size, on scenes that it draws itself."""
