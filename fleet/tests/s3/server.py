"""An S3 store that is not ours, in a process of its own, for push.rs: moto's.

Makes a bucket that everybody may read, prints {"url": …}, then answers each line {"writes": N or null} with what was asked for since the last one, and from then on refuses writes
after N of them. Ends when standard input does.
"""

import json
import sys
import threading

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class Store:
    def __init__(self):
        self.application = DomainDispatcherApplication(create_backend_app)
        self.lock = threading.Lock()
        self.asked = []
        self.writes = None

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self.lock:
            refused = False
            if method in ("PUT", "POST", "DELETE"):
                refused = self.writes == 0
                if self.writes:
                    self.writes -= 1
            if not refused:
                query = environ.get("QUERY_STRING", "")
                self.asked.append({"method": method, "path": path, "query": query})
        if refused:
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code></Error>"]
        return self.application(environ, start_response)

    def take(self, writes):
        with self.lock:
            asked, self.asked, self.writes = self.asked, [], writes
            return asked


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *arguments):
        pass


store = Store()
server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=Quiet)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}"
client = boto3.client("s3", "us-east-1", endpoint_url=url, aws_access_key_id="key", aws_secret_access_key="secret")
client.create_bucket(Bucket="bucket")
statement = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:HeadObject"], "Resource": "arn:aws:s3:::bucket/*"}
client.put_bucket_policy(Bucket="bucket", Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
store.take(None)
print(json.dumps({"url": url}), flush=True)
for line in sys.stdin:
    print(json.dumps(store.take(json.loads(line)["writes"])), flush=True)
