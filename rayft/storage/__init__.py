"""Where files lie (a mounted folder or an object store), and what makes writing them safe."""
