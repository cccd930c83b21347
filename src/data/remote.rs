//! Data behind a URL: `s3://`, `gs://`, `http://`, `https://`. What is fetched is kept in the cache folder, and fetched anew when the server says that it
//! has changed. How to get at a bucket is taken from the environment, as the stores' own tools do (`AWS_...`, `GOOGLE_...`).

use super::error::DataError;
use super::source::refuse;

/// What URLs of data begin with.
const SCHEMES: [&str; 4] = ["s3://", "gs://", "http://", "https://"];

/// Whether this is a URL, whatever files there are.
pub fn is_url(given: &str) -> bool {
    SCHEMES.iter().any(|scheme| given.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme)))
}

/// The file that holds what is behind `url` now.
///
/// # Errors
/// [`DataError::Source`] where this build cannot fetch, or there is nothing to be had; [`DataError::Cache`].
#[cfg(not(feature = "remote"))]
pub fn fetch(url: &str) -> Result<std::path::PathBuf, DataError> {
    let remedy = "build it with cargo build --release --features remote, or fetch the file yourself (curl URL | carrousel train --data -)";
    Err(refuse(url, "this build does not fetch URLs", remedy))
}

#[cfg(feature = "remote")]
pub use fetching::fetch;

#[cfg(feature = "remote")]
mod fetching {
    use std::fs::{self, File};
    use std::io::Write;
    use std::path::PathBuf;

    use futures_util::StreamExt;
    use object_store::{Error, GetOptions, ObjectStore, parse_url_opts};
    use serde::{Deserialize, Serialize};
    use sha2::{Digest, Sha256};
    use url::Url;

    use super::{DataError, refuse};
    use crate::data::tokens::cache_folder;

    /// What the server said of a file when it was fetched.
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Known {
        url: String,
        len: u64,
        e_tag: Option<String>,
        /// Seconds since 1970.
        changed: i64,
    }

    /// The file that holds what is behind `url` now.
    ///
    /// # Errors
    /// [`DataError::Source`] where there is nothing to be had; [`DataError::Cache`].
    pub fn fetch(url: &str) -> Result<PathBuf, DataError> {
        let parsed =
            Url::parse(url).map_err(|e| refuse(url, &format!("it is no URL: {e}"), "write s3://BUCKET/PATH or https://HOST/PATH"))?;
        if parsed.query().is_some() || parsed.path().ends_with('/') {
            let problem = if parsed.query().is_some() {
                "URLs with a query are not fetched"
            } else {
                "it names a folder, and files are fetched one by one"
            };
            return Err(refuse(url, problem, "name a file, or fetch it yourself (curl URL | carrousel train --data -)"));
        }
        let mut hasher = Sha256::new();
        hasher.update(url);
        let name: String = hasher.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        let folder = cache_folder().join("remote").join(name);
        // The file keeps its name, whose ending tells what it is.
        let file_name = parsed.path_segments().and_then(|mut parts| parts.next_back()).filter(|part| !part.is_empty()).unwrap_or("data");
        let (file, about) = (folder.join(file_name), folder.join("about.json"));
        let failed = |source| DataError::Cache { file: folder.display().to_string(), source };
        fs::create_dir_all(&folder).map_err(failed)?;
        let known: Option<Known> = fs::read(&about).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let known = known.filter(|known| known.url == url && fs::metadata(&file).is_ok_and(|found| found.len() == known.len));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        runtime.block_on(async {
            let set =
                std::env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?.to_lowercase(), value.into_string().ok()?)));
            let mut options: Vec<(String, String)> = set.collect();
            if parsed.scheme() == "http" {
                options.push(("allow_http".to_string(), "true".to_string()));
            }
            let (store, path) = parse_url_opts(&parsed, options).map_err(|e| explain(url, &e))?;
            let asked = GetOptions { if_none_match: known.as_ref().and_then(|known| known.e_tag.clone()), ..GetOptions::default() };
            let got = match store.get_opts(&path, asked).await {
                Err(Error::NotModified { .. }) => return Ok(()),
                Err(e) => return Err(explain(url, &e)),
                Ok(got) => got,
            };
            let now = Known {
                url: url.to_string(),
                len: got.meta.size,
                e_tag: got.meta.e_tag.clone(),
                changed: got.meta.last_modified.timestamp(),
            };
            // A server without tags tells by time and length.
            if known.is_some_and(|known| known.e_tag.is_none() && known == now) {
                return Ok(());
            }
            let mut part = tempfile::NamedTempFile::new_in(&folder).map_err(failed)?;
            let mut stream = got.into_stream();
            let mut len = 0;
            while let Some(bytes) = stream.next().await {
                let bytes = bytes.map_err(|e| explain(url, &e))?;
                part.write_all(&bytes).map_err(failed)?;
                len += bytes.len() as u64;
            }
            if len != now.len {
                return Err(refuse(url, &format!("{len} bytes came of {}", now.len), "try again"));
            }
            part.persist(&file).map_err(|e| failed(e.error))?;
            serde_json::to_writer(File::create(&about).map_err(failed)?, &now).map_err(|e| failed(e.into()))
        })?;
        Ok(file)
    }

    fn explain(url: &str, error: &Error) -> DataError {
        let (problem, remedy) = match error {
            Error::NotFound { .. } => ("there is no such file".to_string(), "check the URL"),
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                ("the server refuses it".to_string(), "set the store's keys in the environment, as its own tools read them")
            }
            other => {
                // The chain repeats itself; its end says most.
                let mut cause: &dyn std::error::Error = other;
                while let Some(source) = cause.source() {
                    cause = source;
                }
                (format!("it cannot be fetched: {cause}"), "check the URL, the network and the store's settings in the environment")
            }
        };
        refuse(url, &problem, remedy)
    }
}
