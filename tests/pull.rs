//! `models pull` and `models import`, against a server that speaks the hub's routes.
#![allow(clippy::result_large_err)] // axum's own response is the refusal here

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, Response, StatusCode, header};
use axum::routing::get;
use bytes::Bytes;
use eremois::Error;
use eremois::model::hub::{Hub, Progress, PullRequest, pull};
use eremois::model::install::import;
use eremois::model::manifest::Manifest;
use eremois::model::repository::{Repository, hex, sha256_file};
use futures::StreamExt;
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_test_token";

/// What the pretended hub has, and how it misbehaves.
struct World {
    /// Repository to its files.
    repositories: Mutex<BTreeMap<String, BTreeMap<String, Vec<u8>>>>,
    commit: Mutex<String>,
    /// Needs the token.
    gated: Mutex<Option<String>>,
    /// Bytes of model.safetensors after which the line drops, one for each request to come.
    cuts: Mutex<Vec<usize>>,
    /// Requests for files answered with 503 before anything else.
    num_unwell: AtomicUsize,
    /// Ignores Range and sends all.
    no_ranges: Mutex<bool>,
    /// A wrong checksum for model.safetensors.
    lying: Mutex<bool>,
    /// `method path range authorization` of every request.
    seen: Mutex<Vec<String>>,
}

struct TestHub {
    world: Arc<World>,
    endpoint: String,
    _runtime: tokio::runtime::Runtime,
}

impl TestHub {
    fn start() -> Self {
        let mut files = BTreeMap::new();
        for file in walk(&source_model()) {
            files.insert(file.clone(), fs::read(source_model().join(&file)).unwrap());
        }
        files.insert("README.md".into(), b"# a model".to_vec());
        files.insert("pytorch_model.bin".into(), vec![0; 1000]);
        files.insert("onnx/model.onnx".into(), vec![0; 1000]);
        let world = Arc::new(World {
            repositories: Mutex::new(BTreeMap::from([("org/small".to_string(), files)])),
            commit: Mutex::new(COMMIT.to_string()),
            gated: Mutex::default(),
            cuts: Mutex::default(),
            num_unwell: AtomicUsize::new(0),
            no_ranges: Mutex::default(),
            lying: Mutex::default(),
            seen: Mutex::default(),
        });
        let router = Router::new()
            .route("/api/models/{org}/{name}/revision/{rev}", get(info))
            .route("/{org}/{name}/resolve/{rev}/{*file}", get(resolve))
            .route("/store/{org}/{name}/{*file}", get(store))
            .with_state(world.clone());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async move { axum::serve(listener, router).await });
        Self { world, endpoint, _runtime: runtime }
    }

    fn hub(&self) -> Hub {
        // A token of its own, never that of whoever runs the tests.
        let token = Some(TOKEN.to_string());
        Hub { endpoint: Some(self.endpoint.clone()), token, retry_pause: Duration::from_millis(1) }
    }

    fn seen(&self, part: &str) -> Vec<String> {
        self.world.seen.lock().unwrap().iter().filter(|s| s.contains(part)).cloned().collect()
    }

    fn weights(&self) -> Vec<u8> {
        self.world.repositories.lock().unwrap()["org/small"]["model.safetensors"].clone()
    }
}

/// A small model of the fixtures whose folder is complete.
fn source_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/bert-f16")
}

fn walk(dir: &Path) -> Vec<String> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap()) {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() {
            files.extend(walk(&entry.path()).into_iter().map(|f| format!("{name}/{f}")));
        } else {
            files.push(name);
        }
    }
    files
}

fn note(world: &World, path: String, headers: &HeaderMap) {
    let of = |name| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or("-").to_string();
    world.seen.lock().unwrap().push(format!("{path} {} {}", of(header::RANGE), of(header::AUTHORIZATION)));
}

fn refuse(status: StatusCode, code: &str, message: &str) -> Response<Body> {
    let response = Response::builder().status(status).header("x-error-code", code).header("x-error-message", message);
    response.body(Body::from("{}")).unwrap()
}

fn admit(world: &World, id: &str, headers: &HeaderMap) -> Result<(), Response<Body>> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
    if world.gated.lock().unwrap().as_deref() == Some(id) && bearer != Some("Bearer hf_the_right_one") {
        let status = if bearer.is_some() { StatusCode::FORBIDDEN } else { StatusCode::UNAUTHORIZED };
        return Err(refuse(status, "GatedRepo", "Access to this model is restricted."));
    }
    // The hub does not tell strangers what does not exist.
    match world.repositories.lock().unwrap().contains_key(id) {
        true => Ok(()),
        false if bearer.is_none() => Err(refuse(StatusCode::UNAUTHORIZED, "", "Invalid username or password.")),
        false => Err(refuse(StatusCode::NOT_FOUND, "RepoNotFound", "Repository not found")),
    }
}

type Place = UrlPath<(String, String, String)>;

async fn info(State(world): State<Arc<World>>, UrlPath((org, name, rev)): Place, headers: HeaderMap) -> Response<Body> {
    let id = format!("{org}/{name}");
    note(&world, format!("info {id} {rev}"), &headers);
    if let Err(refusal) = admit(&world, &id, &headers) {
        return refusal;
    }
    let commit = world.commit.lock().unwrap().clone();
    if rev != "main" && rev != "v1" && rev != commit {
        return refuse(StatusCode::NOT_FOUND, "RevisionNotFound", "Invalid rev id");
    }
    let names: Vec<_> =
        world.repositories.lock().unwrap()[&id].keys().map(|f| serde_json::json!({"rfilename": f})).collect();
    let body =
        serde_json::json!({"id": id, "sha": commit, "siblings": names, "cardData": {"license": "mit"}, "extra": 1});
    Response::builder().header("content-type", "application/json").body(Body::from(body.to_string())).unwrap()
}

/// Small files are sent at once with git's checksum; large ones lie in the store behind a redirect that
/// carries their sha256, on what is another host to the client: localhost instead of 127.0.0.1.
async fn resolve(
    State(world): State<Arc<World>>,
    UrlPath((org, name, rev, file)): UrlPath<(String, String, String, String)>,
    headers: HeaderMap,
) -> Response<Body> {
    let id = format!("{org}/{name}");
    note(&world, format!("resolve {file} {rev}"), &headers);
    if world.num_unwell.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "", "come back later");
    }
    if let Err(refusal) = admit(&world, &id, &headers) {
        return refusal;
    }
    let Some(bytes) = world.repositories.lock().unwrap()[&id].get(&file).cloned() else {
        return refuse(StatusCode::NOT_FOUND, "EntryNotFound", "Entry not found");
    };
    let is_large = file.ends_with(".safetensors") || file.ends_with(".gguf");
    if !is_large {
        let blob = sha1::Sha1::new_with_prefix(format!("blob {}\0", bytes.len())).chain_update(&bytes).finalize();
        return ranged(&world, &headers, bytes, Some(format!("\"{}\"", hex(&blob))), None);
    }
    let lying = *world.lying.lock().unwrap();
    let sha256 = if lying { "0".repeat(64) } else { hex(&Sha256::digest(&bytes)) };
    let port = headers[header::HOST].to_str().unwrap().rsplit(':').next().unwrap().to_string();
    Response::builder()
        .status(StatusCode::FOUND)
        .header("x-repo-commit", COMMIT)
        .header("x-linked-etag", format!("\"{sha256}\""))
        .header("x-linked-size", bytes.len())
        .header("etag", "\"not-the-files\"")
        .header("location", format!("http://localhost:{port}/store/{id}/{file}"))
        .body(Body::empty())
        .unwrap()
}

async fn store(
    State(world): State<Arc<World>>,
    UrlPath((org, name, file)): Place,
    headers: HeaderMap,
) -> Response<Body> {
    note(&world, format!("store {file}"), &headers);
    let bytes = world.repositories.lock().unwrap()[&format!("{org}/{name}")][&file].clone();
    let cut = world.cuts.lock().unwrap().pop();
    ranged(&world, &headers, bytes, Some("\"multipart-12\"".to_string()), cut)
}

/// The file or the part of it asked for; cut off after so many bytes, though more were promised.
fn ranged(
    world: &World,
    headers: &HeaderMap,
    bytes: Vec<u8>,
    etag: Option<String>,
    cut: Option<usize>,
) -> Response<Body> {
    let from = headers.get(header::RANGE).and_then(|v| v.to_str().ok()).filter(|_| !*world.no_ranges.lock().unwrap());
    let from: Option<usize> = from.map(|r| r.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
    let total = bytes.len();
    let mut response = Response::builder();
    if let Some(etag) = etag {
        response = response.header("etag", etag);
    }
    if from.is_some_and(|from| from >= total) {
        let response =
            response.status(StatusCode::RANGE_NOT_SATISFIABLE).header("content-range", format!("bytes */{total}"));
        return response.body(Body::empty()).unwrap();
    }
    if let Some(from) = from {
        response = response.status(StatusCode::PARTIAL_CONTENT);
        response = response.header("content-range", format!("bytes {from}-{}/{total}", total - 1));
    }
    let rest = bytes[from.unwrap_or(0)..].to_vec();
    response = response.header("content-length", rest.len());
    match cut {
        None => response.body(Body::from(rest)).unwrap(),
        Some(cut) => {
            let first = Bytes::copy_from_slice(&rest[..cut]);
            let pieces = futures::stream::once(async move { Ok(first) }).chain(futures::stream::once(async {
                // The first piece is to be on the wire before the connection goes.
                tokio::time::sleep(Duration::from_millis(50)).await;
                Err(std::io::Error::other("the line drops"))
            }));
            response.body(Body::from_stream(pieces)).unwrap()
        }
    }
}

/// Remembers what it was told.
#[derive(Default)]
struct Told(Mutex<Vec<String>>);

impl Progress for Told {
    fn begin(&self, file: &str, size: u64, have: u64) {
        self.0.lock().unwrap().push(format!("begin {file} {size} {have}"));
    }
    fn advance(&self, num_bytes: u64) {
        self.0.lock().unwrap().push(format!("advance {num_bytes}"));
    }
    fn end(&self, file: &str) {
        self.0.lock().unwrap().push(format!("end {file}"));
    }
}

fn pulled(test: &TestHub, root: &Path, model: &str) -> eremois::Result<eremois::model::install::Installed> {
    pull(&test.hub(), &Repository::new(root), &PullRequest::parse(model).unwrap(), &Told::default())
}

fn manifest(root: &Path, name: &str) -> Manifest {
    Manifest::read(&root.join(name).join("manifest.toml")).unwrap()
}

#[test]
fn a_model_is_pulled_checked_and_written_into_a_manifest() {
    let (test, dir) = (TestHub::start(), tempfile::tempdir().unwrap());
    let root = dir.path().join("models");
    let told = Told::default();
    let installed =
        pull(&test.hub(), &Repository::new(&root), &PullRequest::parse("org/small").unwrap(), &told).unwrap();
    assert_eq!((installed.name.as_str(), installed.version, installed.new), ("small", 1, true));

    let manifest = manifest(&root, "small");
    let version = &manifest.versions[&1];
    assert_eq!(manifest.licence.as_deref(), Some("mit"));
    assert_eq!(version.provenance.repository.as_deref(), Some("org/small"));
    assert_eq!(version.provenance.revision.as_deref(), Some(COMMIT));
    for unwanted in ["README.md", "pytorch_model.bin", "onnx/model.onnx", "texts.json"] {
        assert!(!version.files.contains_key(unwanted), "{unwanted} is not needed");
        assert!(test.seen(&format!("resolve {unwanted}")).is_empty());
    }
    assert_eq!(version.files["model.safetensors"], hex(&Sha256::digest(test.weights())));
    assert!(version.files.contains_key("1_Pooling/config.json"), "{:?}", version.files);
    let (entry, v) = Repository::new(&root).find("small").unwrap();
    assert!(entry.verify_files(v).unwrap() > test.weights().len() as u64);
    assert!(!root.join(".pull").exists(), "nothing is left of the staging");

    let told = told.0.into_inner().unwrap();
    let size = test.weights().len();
    assert!(told.contains(&format!("begin model.safetensors {size} 0")), "{told:?}");
    assert_eq!(told.last().unwrap(), "end model.safetensors", "weights come last");
    // Files are asked for by commit, so that a moving branch cannot mix two.
    assert!(test.seen("resolve").iter().all(|s| s.contains(COMMIT)));
}

#[test]
fn the_token_goes_to_the_hub_and_not_to_its_store() {
    let (test, dir) = (TestHub::start(), tempfile::tempdir().unwrap());
    pulled(&test, dir.path(), "org/small").unwrap();
    let bearer = format!("Bearer {TOKEN}");
    let asked = [test.seen("info"), test.seen("resolve")].concat();
    assert!(asked.len() > 3 && asked.iter().all(|s| s.ends_with(&bearer)), "{asked:?}");
    let store = test.seen("store");
    assert!(!store.is_empty() && store.iter().all(|s| s.ends_with(" -")), "{store:?}");
}

#[test]
fn a_cut_line_is_resumed_where_it_dropped() {
    let (test, dir) = (TestHub::start(), tempfile::tempdir().unwrap());
    // Taken from the end: 1000 bytes, then nothing, then 500 more, then the rest.
    *test.world.cuts.lock().unwrap() = vec![500, 0, 1000];
    pulled(&test, dir.path(), "org/small").unwrap();
    let ranges: Vec<String> = test.seen("store").iter().map(|s| s.split(' ').nth(2).unwrap().to_string()).collect();
    assert_eq!(ranges, ["-", "bytes=1000-", "bytes=1000-", "bytes=1500-"]);
    let (entry, version) = Repository::new(dir.path()).find("small").unwrap();
    entry.verify_files(version).unwrap();
}

#[test]
fn a_pull_that_gave_up_is_gone_on_with_by_the_next() {
    let (test, dir) = (TestHub::start(), tempfile::tempdir().unwrap());
    // Each try after the first brings nothing, until the pull gives up.
    *test.world.cuts.lock().unwrap() = vec![0, 0, 0, 0, 0, 2000];
    let error = pulled(&test, dir.path(), "org/small").unwrap_err().to_string();
    assert!(error.contains("model.safetensors") && error.contains("2000 bytes are kept"), "{error}");
    assert!(!dir.path().join("small").exists(), "half a model is not served");
    assert!(Repository::new(dir.path()).list().unwrap().is_empty());

    test.world.seen.lock().unwrap().clear();
    *test.world.cuts.lock().unwrap() = Vec::new();
    pulled(&test, dir.path(), "org/small").unwrap();
    assert_eq!(test.seen("store")[0].split(' ').nth(2), Some("bytes=2000-"));
    assert!(test.seen("resolve config.json").is_empty(), "finished files are not fetched again");
    let (entry, version) = Repository::new(dir.path()).find("small").unwrap();
    entry.verify_files(version).unwrap();
}

#[test]
fn a_part_that_is_whole_or_too_long_is_no_dead_end() {
    for extra in [0, 7] {
        let (test, dir) = (TestHub::start(), tempfile::tempdir().unwrap());
        let staging = dir.path().join(format!(".pull/org--small@{COMMIT}"));
        fs::create_dir_all(&staging).unwrap();
        fs::write(staging.join("model.safetensors.part"), [test.weights(), vec![1; extra]].concat()).unwrap();
        pulled(&test, dir.path(), "org/small").unwrap();
        let (entry, version) = Repository::new(dir.path()).find("small").unwrap();
        entry.verify_files(version).unwrap();
    }
}

#[test]
fn a_server_without_ranges_begins_again() {
    let (test, dir) = (TestHub::start(), tempfile::tempdir().unwrap());
    *test.world.no_ranges.lock().unwrap() = true;
    *test.world.cuts.lock().unwrap() = vec![1000];
    pulled(&test, dir.path(), "org/small").unwrap();
    let (entry, version) = Repository::new(dir.path()).find("small").unwrap();
    entry.verify_files(version).unwrap();
}

#[test]
fn a_server_that_is_unwell_is_asked_again() {
    let (test, dir) = (TestHub::start(), tempfile::tempdir().unwrap());
    test.world.num_unwell.store(4, Ordering::SeqCst);
    pulled(&test, dir.path(), "org/small").unwrap();
    assert_eq!(test.seen("resolve 1_Pooling").len(), 5, "the first file was asked for five times");
    fs::remove_dir_all(dir.path().join("small")).unwrap();
    test.world.num_unwell.store(usize::MAX, Ordering::SeqCst);
    let error = pulled(&test, dir.path(), "org/small").unwrap_err().to_string();
    assert!(error.contains("1_Pooling/config.json: 503"), "{error}");
}

#[test]
fn a_wrong_checksum_is_refused_and_its_bytes_dropped() {
    let (test, dir) = (TestHub::start(), tempfile::tempdir().unwrap());
    *test.world.lying.lock().unwrap() = true;
    match pulled(&test, dir.path(), "org/small").unwrap_err() {
        Error::Checksum { file, expected, got } => {
            assert!(file.to_string_lossy().ends_with("model.safetensors"), "{}", file.display());
            assert_eq!((expected, got), ("0".repeat(64), hex(&Sha256::digest(test.weights()))));
        }
        e => panic!("{e}"),
    }
    assert!(!dir.path().join("small").exists());
    let part = dir.path().join(format!(".pull/org--small@{COMMIT}/model.safetensors.part"));
    assert!(!part.exists(), "going on from wrong bytes would fail for ever");
    *test.world.lying.lock().unwrap() = false;
    pulled(&test, dir.path(), "org/small").unwrap();
}

#[test]
fn gated_private_and_unknown_repositories_say_what_to_do() {
    let (test, dir) = (TestHub::start(), tempfile::tempdir().unwrap());
    let unknown = pulled(&test, dir.path(), "org/nothing").unwrap_err().to_string();
    assert!(unknown.contains("org/nothing does not exist there: 404"), "{unknown}");
    let revision = pulled(&test, dir.path(), "org/small@v9").unwrap_err().to_string();
    assert!(revision.contains("org/small has no such revision: 404"), "{revision}");
    *test.world.gated.lock().unwrap() = Some("org/small".to_string());
    let forbidden = pulled(&test, dir.path(), "org/small").unwrap_err().to_string();
    assert!(forbidden.contains("org/small is gated: accept its terms") && forbidden.contains("403"), "{forbidden}");
    assert!(forbidden.contains("Access to this model is restricted."), "{forbidden}");
    assert!(forbidden.contains(&test.endpoint), "{forbidden}");
    assert!(!forbidden.contains(TOKEN), "a token is not told: {forbidden}");
    let hub = Hub { token: Some("hf_the_right_one".to_string()), ..test.hub() };
    pull(&hub, &Repository::new(dir.path()), &PullRequest::parse("org/small@v1").unwrap(), &Told::default()).unwrap();
}

#[test]
fn a_second_pull_does_nothing_and_a_new_commit_is_a_new_version() {
    let (test, dir) = (TestHub::start(), tempfile::tempdir().unwrap());
    pulled(&test, dir.path(), "org/small").unwrap();
    // What people write into a manifest stays.
    let path = dir.path().join("small/manifest.toml");
    fs::write(&path, format!("# kept by hand\nmax_seq_len = 16\n{}", fs::read_to_string(&path).unwrap())).unwrap();

    test.world.seen.lock().unwrap().clear();
    let again = pulled(&test, dir.path(), "org/small").unwrap();
    assert_eq!((again.version, again.new), (1, false));
    assert!(test.seen("resolve").is_empty());

    *test.world.commit.lock().unwrap() = "f".repeat(40);
    let same_files = pulled(&test, dir.path(), "org/small").unwrap();
    assert_eq!((same_files.version, same_files.new), (1, false), "a commit that changed no file we need");
    let mut repositories = test.world.repositories.lock().unwrap();
    repositories.get_mut("org/small").unwrap().get_mut("config.json").unwrap().push(b'\n');
    drop(repositories);
    let newer = pulled(&test, dir.path(), "org/small").unwrap();
    assert_eq!((newer.version, newer.new), (2, true));
    let manifest = manifest(dir.path(), "small");
    assert_eq!(manifest.versions.keys().copied().collect::<Vec<_>>(), [1, 2]);
    assert_eq!(manifest.max_seq_len, Some(16));
    assert!(fs::read_to_string(&path).unwrap().starts_with("# kept by hand"));
    assert_eq!(Repository::new(dir.path()).find("small").unwrap().1, 2);
}

#[test]
fn what_cannot_be_served_is_refused_before_its_weights_come() {
    let (test, dir) = (TestHub::start(), tempfile::tempdir().unwrap());
    let mut repositories = test.world.repositories.lock().unwrap();
    let mut only_bin = repositories["org/small"].clone();
    only_bin.remove("model.safetensors");
    repositories.insert("org/bin".into(), only_bin);
    repositories.insert("org/ggufs".into(), BTreeMap::from([("a.gguf".into(), vec![]), ("b.gguf".into(), vec![])]));
    let mut broken = repositories["org/small"].clone();
    broken.insert("config.json".into(), b"{\"model_type\": \"mamba\"}".to_vec());
    repositories.insert("org/broken".into(), broken);
    drop(repositories);
    let cases = [
        ("org/bin", "org/bin: has weights only in other formats"),
        ("org/ggufs", "name one with --file: a.gguf, b.gguf"),
        ("org/broken", "architecture `mamba` is not supported"),
    ];
    for (model, reason) in cases {
        let error = pulled(&test, dir.path(), model).unwrap_err().to_string();
        assert!(error.contains(reason), "{model}: {error}");
    }
    assert!(Repository::new(dir.path()).list().unwrap().is_empty());
    for model in ["small", "a/b/c", "../x/y", "org/", "/small", "org/small@", "or g/small"] {
        assert!(PullRequest::parse(model).is_err(), "{model}");
    }
    let request = PullRequest { name: Some("../out".into()), ..PullRequest::parse("org/small").unwrap() };
    let error = pull(&test.hub(), &Repository::new(dir.path()), &request, &Told::default()).unwrap_err().to_string();
    assert!(error.contains("`../out` cannot be a model's folder"), "{error}");
}

#[test]
fn a_gguf_file_is_pulled_by_name() {
    let (test, dir) = (TestHub::start(), tempfile::tempdir().unwrap());
    let gguf = fs::read(source_model().with_file_name("bert-gguf").join("bert.gguf")).unwrap();
    let files = BTreeMap::from([("bert-f32.gguf".to_string(), gguf), ("bert-q2.gguf".to_string(), vec![0; 9])]);
    test.world.repositories.lock().unwrap().insert("org/quantized".into(), files);
    let request = PullRequest { file: Some("bert-f32.gguf".into()), ..PullRequest::parse("org/quantized").unwrap() };
    pull(&test.hub(), &Repository::new(dir.path()), &request, &Told::default()).unwrap();
    let manifest = manifest(dir.path(), "quantized");
    assert_eq!(manifest.versions[&1].weights, ["bert-f32.gguf"]);
    assert_eq!(manifest.versions[&1].files.len(), 1);
}

#[test]
fn a_folder_is_imported_once_and_a_broken_one_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let models = Repository::new(dir.path().join("models"));
    let installed = import(&models, &source_model(), Some("mine"), None).unwrap();
    assert_eq!((installed.version, installed.new), (1, true));
    let (entry, version) = models.find("mine").unwrap();
    entry.verify_files(version).unwrap();
    let weights = installed.dir.join("model.safetensors");
    assert_eq!(sha256_file(&weights).unwrap().0, sha256_file(&source_model().join("model.safetensors")).unwrap().0);
    assert!(!import(&models, &source_model(), Some("mine"), None).unwrap().new, "the same files again");

    let broken = dir.path().join("broken");
    for file in walk(&source_model()) {
        fs::create_dir_all(broken.join(&file).parent().unwrap()).unwrap();
        fs::copy(source_model().join(&file), broken.join(&file)).unwrap();
    }
    let bytes = fs::read(broken.join("model.safetensors")).unwrap();
    fs::write(broken.join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    let error = import(&models, &broken, None, None).unwrap_err().to_string();
    assert!(error.contains("model.safetensors"), "{error}");
    assert!(models.find("broken").is_err());
    assert!(!models.root().join(".pull").exists(), "nothing is left behind");
    let missing = import(&models, &dir.path().join("nowhere"), None, None).unwrap_err().to_string();
    assert!(missing.contains("there is no such folder or file"), "{missing}");

    let gguf = source_model().with_file_name("bert-gguf").join("bert.gguf");
    assert_eq!(import(&models, &gguf, None, None).unwrap().name, "bert");
    // A folder another hand put there is not touched.
    fs::create_dir_all(models.root().join("hand")).unwrap();
    let error = import(&models, &gguf, Some("hand"), None).unwrap_err().to_string();
    assert!(error.contains("is there and has no manifest.toml"), "{error}");
}

#[test]
fn the_command_pulls_from_where_the_environment_says() {
    let (test, dir) = (TestHub::start(), tempfile::tempdir().unwrap());
    *test.world.gated.lock().unwrap() = Some("org/small".to_string());
    let run = |token: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_eremois"));
        command.env_clear().current_dir(dir.path()).env("HF_ENDPOINT", &test.endpoint).env("HF_TOKEN", token);
        let output = command.args(["models", "pull", "org/small", "--name", "mine"]).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, _, errors) = run("hf_a_wrong_one");
    assert!(code == Some(1) && errors.contains("org/small is gated"), "{errors}");
    let (code, words, errors) = run("hf_the_right_one");
    assert_eq!(code, Some(0), "{errors}");
    assert!(words.contains("mine is version 1 in models/mine/1"), "{words}");
    assert!(errors.contains("model.safetensors: "), "without a terminal each file is a line: {errors}");
    assert!(manifest(&dir.path().join("models"), "mine").versions.contains_key(&1));
}

#[test]
fn a_task_that_is_asked_for_is_checked_and_stays_the_models() {
    let dir = tempfile::tempdir().unwrap();
    let models = Repository::new(dir.path().join("models"));
    let heads = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/heads");
    let task = |name: &str| manifest(models.root(), name).task;
    let refused = |source: &str, name: &str, asked: &str| {
        import(&models, &heads.join(source), Some(name), Some(asked)).unwrap_err().to_string()
    };
    // A masked language model is one for filling masks by its files, and can be a sparse one as well.
    import(&models, &heads.join("bert-masked-lm"), Some("filler"), None).unwrap();
    import(&models, &heads.join("bert-masked-lm"), Some("splade"), Some("sparse")).unwrap();
    assert_eq!((task("filler").as_str(), task("splade").as_str()), ("fill_mask", "sparse"));
    // Every encoder embeds, but a classifier has no head to fill masks with.
    import(&models, &heads.join("bert-nli"), Some("encoder"), Some("embed")).unwrap();
    assert_eq!(task("encoder"), "embed");
    let error = refused("bert-nli", "none", "fill_mask");
    assert!(error.contains("model.safetensors") || error.contains("cls."), "{error}");
    let error = refused("bert-masked-lm", "none", "classify");
    assert!(!error.is_empty() && !models.root().join("none").exists(), "{error}");
    for (asked, says) in [("infer", "none that can be chosen; known: embed, classify"), ("poetry", "`poetry` is none")]
    {
        let error = refused("bert-nli", "none", asked);
        assert!(error.contains("task") && error.contains(says), "{error}");
    }
    // What is there keeps its task: the next version is proven for it, and another one is refused.
    assert!(!import(&models, &heads.join("bert-masked-lm"), Some("splade"), None).unwrap().new);
    let error = refused("bert-masked-lm", "splade", "fill_mask");
    assert!(error.contains("`splade` is there with the task `sparse`, not `fill_mask`"), "{error}");
    assert!(!models.root().join(".pull").exists(), "nothing is left behind");
}
