"""What a service has done, kept in etcd. The only package that knows etcd."""
