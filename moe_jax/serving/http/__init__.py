"""The service over HTTP, and over gRPC: a transport around one ``RouterEngine``.

``protocol`` turns bytes into arrays and back and knows nothing else; ``app`` holds the routes,
``door`` what they share, ``server`` the process's life. ``create_app`` is the way in for other
servers: any ASGI server can run it.
"""
