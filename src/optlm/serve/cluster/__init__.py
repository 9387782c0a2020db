"""`optlm serve --ray`: engines in the workers of a Ray cluster behind one front.

    connect           a cluster: one of our own on loopback, or one that runs
    beginnings        what a request begins with, and who read that last
    router            Ray Serve's choice among replicas, by beginnings and load
    replica           in a worker: an engine and the server's own routes over it, without sockets
    front             the same routes again, each passed on to a replica
    server            a process: front, socket, signals, and the deployment behind them

Front and replicas are both the app of `optlm.serve.app`: the replicas' routes run plans on an
engine, those of the front look at keys, bodies and clients that leave, and pass the rest on.
"""
