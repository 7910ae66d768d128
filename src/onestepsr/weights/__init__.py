"""Names, checksums, licences, downloads and file formats of weights."""
