"""A local S3 server (moto), spoken to through pyarrow like the real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
import requests
from moto.server import ThreadedMotoServer
from pyarrow.fs import FileSystem


@contextmanager
def s3_server() -> Iterator[str]:
    """URI template with one hole: the path inside an existing bucket."""
    patch = pytest.MonkeyPatch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "test")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1"
    FileSystem.from_uri(f"s3://bucket?{options}&allow_bucket_creation=true")[0].create_dir("bucket")
    yield f"s3://bucket/{{}}?{options}"
    server.stop()
    patch.undo()


@contextmanager
def guarded_s3() -> Iterator[tuple[str, str, str]]:
    """A server that checks every signature, and nothing in the environment to sign with: address
    of an existing bucket without credentials, key, secret."""
    patch = pytest.MonkeyPatch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        patch.delenv(name, raising=False)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    bucket, user = f"guarded-{port}", f"trainer-{port}"
    open_to_all = dict(
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="anybody",
        aws_secret_access_key="anything",
    )
    boto3.client("s3", **open_to_all).create_bucket(Bucket=bucket)
    iam = boto3.client("iam", **open_to_all)
    # moto's state outlives its server
    iam.create_user(UserName=user)
    everything = {"Effect": "Allow", "Action": "*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [everything]})
    iam.put_user_policy(UserName=user, PolicyName="all", PolicyDocument=policy)
    made = iam.create_access_key(UserName=user)["AccessKey"]
    requests.post(f"{url}/moto-api/reset-auth", data="0", timeout=10)
    address = f"s3://{bucket}/runs?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
    yield address, made["AccessKeyId"], made["SecretAccessKey"]
    requests.post(f"{url}/moto-api/reset-auth", data="inf", timeout=10)
    server.stop()
    patch.undo()
