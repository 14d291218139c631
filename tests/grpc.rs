//! The Open Inference Protocol over gRPC, over a socket, with the fake model behind it.

mod common;

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::http::{self, Server};
use eremois::api::grpc;
use eremois::api::grpc::pb::grpc_inference_service_client::GrpcInferenceServiceClient;
use eremois::api::grpc::pb::infer_parameter::ParameterChoice;
use eremois::api::grpc::pb::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use eremois::api::grpc::pb::*;
use eremois::serve::Health;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// What the fake model answers for `w1 w2` and for `w3`.
const W12: [f32; 8] = [3.0, 2.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0];
const W3: [f32; 8] = [3.0, 1.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0];

struct Served {
    server: Server,
    channel: Channel,
    client: GrpcInferenceServiceClient<Channel>,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<eremois::Result<()>>,
}

async fn served() -> Served {
    let server = http::plain().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(grpc::serve(listener, server.state.clone(), async move {
        let _ = stopped.await;
    }));
    let channel = Channel::from_shared(format!("http://{address}")).unwrap().timeout(http::LONG).connect_lazy();
    let client = GrpcInferenceServiceClient::new(channel.clone());
    Served { server, channel, client, stop, serving }
}

fn parameter(choice: ParameterChoice) -> InferParameter {
    InferParameter { parameter_choice: Some(choice) }
}

fn input(name: &str, datatype: &str, shape: &[i64], contents: Option<InferTensorContents>) -> InferInputTensor {
    let (name, datatype, shape) = (name.to_string(), datatype.to_string(), shape.to_vec());
    InferInputTensor { name, datatype, shape, parameters: HashMap::new(), contents }
}

fn listed(texts: &[&str]) -> Option<InferTensorContents> {
    let bytes_contents = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    Some(InferTensorContents { bytes_contents, ..Default::default() })
}

/// A request for these texts, each as an element of a list.
fn texts(texts: &[&str]) -> ModelInferRequest {
    let inputs = vec![input("text", "BYTES", &[texts.len() as i64], listed(texts))];
    ModelInferRequest { model_name: "fake".into(), inputs, ..Default::default() }
}

fn packed_texts(texts: &[&str]) -> Vec<u8> {
    texts.iter().flat_map(|t| [&(t.len() as u32).to_le_bytes()[..], t.as_bytes()].concat()).collect()
}

#[track_caller]
fn floats(response: &ModelInferResponse) -> Vec<f32> {
    assert_eq!((response.outputs.len(), response.raw_output_contents.len()), (1, 1));
    let (chunks, rest) = response.raw_output_contents[0].as_chunks::<4>();
    assert!(rest.is_empty());
    chunks.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect()
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<tonic::Response<T>, Status>, code: Code, says: &str) {
    let status = result.unwrap_err();
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(says), "`{}` does not say `{says}`", status.message());
}

#[tokio::test]
async fn tensors_go_in_and_come_out() {
    let mut served = served().await;
    let mut asked = texts(&["w1 w2", "w3"]);
    asked.id = "7".into();
    let answer = served.client.model_infer(asked).await.unwrap().into_inner();
    assert_eq!((&*answer.model_name, &*answer.model_version, &*answer.id), ("fake", "1", "7"));
    let output = &answer.outputs[0];
    assert_eq!((&*output.name, &*output.datatype, &output.shape[..]), ("embedding", "FP32", &[2, 8][..]));
    assert_eq!(floats(&answer), [W12, W3].concat());

    // Raw, and of a named version and output.
    let outputs = vec![InferRequestedOutputTensor { name: "embedding".into(), parameters: HashMap::new() }];
    let raw = ModelInferRequest {
        model_version: "1".into(),
        inputs: vec![input("text", "BYTES", &[2, 1], None)],
        outputs,
        raw_input_contents: vec![packed_texts(&["w1 w2", "w3"]).into()],
        ..texts(&[])
    };
    assert_eq!(floats(&served.client.model_infer(raw).await.unwrap().into_inner()), [W12, W3].concat());

    // Token ids with their padding, in lists.
    let ids = InferTensorContents { int64_contents: vec![1, 2, 3, 0], ..Default::default() };
    let mask = InferTensorContents { int_contents: vec![1, 1, 1, 0], ..Default::default() };
    let inputs =
        vec![input("input_ids", "INT64", &[2, 2], Some(ids)), input("attention_mask", "INT32", &[2, 2], Some(mask))];
    let answer = served.client.model_infer(ModelInferRequest { inputs, ..texts(&[]) }).await.unwrap().into_inner();
    assert_eq!(floats(&answer), [W12, W3].concat());

    let mut cut = texts(&["w1 w2"]);
    cut.parameters.insert("dimensions".into(), parameter(ParameterChoice::Int64Param(3)));
    cut.parameters.insert("unknown".into(), parameter(ParameterChoice::StringParam("ignored".into())));
    assert_eq!(floats(&served.client.model_infer(cut).await.unwrap().into_inner()), W12[..3]);
}

#[tokio::test]
async fn what_is_refused_has_a_code_and_names_the_field() {
    let mut served = served().await;
    let one = |input: InferInputTensor| ModelInferRequest { inputs: vec![input], ..texts(&[]) };
    let raw = |raw: Vec<Vec<u8>>| ModelInferRequest {
        inputs: vec![input("text", "BYTES", &[1], None)],
        raw_input_contents: raw.into_iter().map(Into::into).collect(),
        ..texts(&[])
    };
    let with = |key: &str, choice: ParameterChoice| {
        let mut asked = texts(&["w1"]);
        asked.parameters.insert(key.into(), parameter(choice));
        asked
    };
    let named = |name: &str, version: &str| ModelInferRequest {
        model_name: name.into(),
        model_version: version.into(),
        ..texts(&["w1"])
    };
    let long = "w1 ".repeat(http::MAX_SEQ_LEN + 1);
    for (asked, code, says) in [
        (named("other", ""), Code::NotFound, "no model is named `other`"),
        (named("fake", "9"), Code::NotFound, "`9`"),
        (texts(&[]), Code::InvalidArgument, "text must not be empty"),
        (texts(&["w1", ""]), Code::InvalidArgument, "text[1] must not be empty"),
        (texts(&[&long]), Code::InvalidArgument, "text has 65 tokens"),
        (texts(&["fail"]), Code::Internal, "failed on this batch"),
        (texts(&["panic"]), Code::Internal, "failed on this batch"),
        (one(input("text", "STRING", &[1], listed(&["a"]))), Code::InvalidArgument, "inputs[0].datatype"),
        (one(input("text", "BYTES", &[-1], listed(&["a"]))), Code::InvalidArgument, "inputs[0].shape"),
        (one(input("text", "BYTES", &[2], listed(&["a"]))), Code::InvalidArgument, "has 1 elements"),
        (one(input("image", "FP32", &[1], listed(&["a"]))), Code::InvalidArgument, "no input is named `image`"),
        (raw(vec![vec![1, 2]]), Code::InvalidArgument, "text: its bytes end within element 0"),
        (raw(vec![vec![0; 4]; 2]), Code::InvalidArgument, "raw_input_contents: has 2 entries for 1 inputs"),
        (with("dimensions", ParameterChoice::StringParam("3".into())), Code::InvalidArgument, "parameters.dimensions"),
        (with("dimensions", ParameterChoice::Int64Param(9)), Code::InvalidArgument, "parameters.dimensions"),
        (with("timeout", ParameterChoice::Int64Param(-1)), Code::InvalidArgument, "parameters.timeout"),
    ] {
        refused(served.client.model_infer(asked).await, code, says);
    }
    // Longer than a body may be.
    let huge = "w".repeat(70 << 10);
    assert!(served.client.model_infer(texts(&[&huge])).await.is_err());
    served.server.starting.store(true, Ordering::Relaxed);
    refused(served.client.model_infer(named("other", "")).await, Code::Unavailable, "loading");
}

#[tokio::test]
async fn a_deadline_is_the_clients_or_the_parameters() {
    let mut served = served().await;
    served.server.controls.hold();
    let mut timed = texts(&["w1"]);
    timed.parameters.insert("timeout".into(), parameter(ParameterChoice::Int64Param(20_000)));
    refused(served.client.model_infer(timed).await, Code::DeadlineExceeded, "within the deadline");
    let mut request = Request::new(texts(&["w1"]));
    request.set_timeout(Duration::from_millis(20));
    let code = served.client.model_infer(request).await.unwrap_err().code();
    // Whoever is first: the client, the transport, the queue.
    assert!(matches!(code, Code::DeadlineExceeded | Code::Cancelled), "{code:?}");
    served.server.controls.release();
    served.client.model_infer(texts(&["w1"])).await.unwrap();
}

#[tokio::test]
async fn models_are_described_as_over_rest() {
    let mut served = served().await;
    let about = served.client.server_metadata(ServerMetadataRequest {}).await.unwrap().into_inner();
    assert_eq!((&*about.name, &*about.version), ("eremois", "0.0.0"));
    let (name, version) = ("fake".to_string(), String::new());
    let asked = ModelMetadataRequest { name: name.clone(), version: version.clone() };
    let metadata = served.client.model_metadata(asked).await.unwrap().into_inner();
    assert_eq!((&*metadata.name, &metadata.versions[..]), ("fake", &["1".to_string()][..]));
    assert_eq!((&*metadata.inputs[0].name, &metadata.inputs[0].shape[..]), ("text", &[-1, 1][..]));
    assert_eq!((&*metadata.outputs[0].datatype, &metadata.outputs[0].shape[..]), ("FP32", &[-1, 8][..]));

    let asked = ModelConfigRequest { name: name.clone(), version: version.clone() };
    let config = served.client.model_config(asked).await.unwrap().into_inner().config.unwrap();
    assert_eq!((config.max_batch_size, config.input[0].data_type()), (32, DataType::TypeString));
    assert_eq!((&config.input[0].dims[..], config.input.len()), (&[1][..], 1));
    assert_eq!(config.response_cache.map(|cache| cache.enable), Some(false));
    assert_eq!((config.output[0].data_type(), &config.output[0].dims[..]), (DataType::TypeFp32, &[8][..]));

    served.client.model_infer(texts(&["w1", "w2"])).await.unwrap();
    for name in ["fake", ""] {
        let asked = ModelStatisticsRequest { name: name.into(), version: version.clone() };
        let stats = served.client.model_statistics(asked).await.unwrap().into_inner().model_stats;
        assert_eq!((stats[0].inference_count, stats[0].execution_count), (2, 1));
        assert_eq!(stats[0].inference_stats.unwrap().success.unwrap().count, 1);
    }
    let index = served.client.repository_index(RepositoryIndexRequest::default()).await.unwrap().into_inner().models;
    assert_eq!((&*index[0].name, &*index[0].state), ("fake", "READY"));
    let load = RepositoryModelLoadRequest { model_name: "fake".into(), ..Default::default() };
    refused(served.client.repository_model_load(load).await, Code::InvalidArgument, "cannot be loaded");
    let unload = RepositoryModelUnloadRequest { model_name: "fake".into(), ..Default::default() };
    refused(served.client.repository_model_unload(unload).await, Code::InvalidArgument, "cannot be unloaded");
}

#[tokio::test]
async fn health_is_that_of_the_models() {
    let mut served = served().await;
    let mut health = HealthClient::new(served.channel.clone());
    let of = |service: &str| HealthCheckRequest { service: service.to_string() };
    let mut watch = health.watch(of("")).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    for service in ["", "inference.GRPCInferenceService"] {
        assert_eq!(health.check(of(service)).await.unwrap().into_inner().status(), ServingStatus::Serving);
    }
    assert_eq!(health.check(of("other")).await.unwrap_err().code(), Code::NotFound);
    let ready = ModelReadyRequest { name: "fake".into(), version: String::new() };
    assert!(served.client.server_live(ServerLiveRequest {}).await.unwrap().into_inner().live);
    assert!(served.client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    assert!(served.client.model_ready(ready.clone()).await.unwrap().into_inner().ready);

    served.server.controls.broken.store(true, Ordering::SeqCst);
    refused(served.client.model_infer(texts(&["w1"])).await, Code::Internal, "failed");
    served.server.wait_for(|health| matches!(health, Health::Unhealthy(_))).await;
    assert!(!served.client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    assert!(!served.client.model_ready(ready).await.unwrap().into_inner().ready);
    assert_eq!(health.check(of("")).await.unwrap().into_inner().status(), ServingStatus::NotServing);
    let told = tokio::time::timeout(http::LONG, watch.message()).await.unwrap();
    assert_eq!(told.unwrap().unwrap().status(), ServingStatus::NotServing);
}

#[tokio::test]
async fn a_call_under_way_is_answered_when_the_server_stops() {
    let mut served = served().await;
    served.client.server_live(ServerLiveRequest {}).await.unwrap();
    served.server.controls.hold();
    let mut client = served.client.clone();
    let asked = tokio::spawn(async move { client.model_infer(texts(&["w3"])).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    served.stop.send(()).unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    served.server.controls.release();
    assert_eq!(floats(&asked.await.unwrap().unwrap().into_inner()), W3);
    drop((served.client, served.channel));
    tokio::time::timeout(http::LONG, served.serving).await.unwrap().unwrap().unwrap();
}
