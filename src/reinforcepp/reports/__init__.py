"""Report pages: one HTML file each, readable offline."""
