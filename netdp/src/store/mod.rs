//! The store: the desired state on disk, so that an agent's successor goes on where it ended.
//!
//! Owns `<state-dir>/netdp.redb` and the lock that keeps a second agent out. A damaged store is
//! reported and never written to. Knows nothing of what the state means.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use self::record::{EndpointRecord, NetworkRecord};
use crate::{
    difference::{Step, steps},
    model::{EndpointId, Model, NetworkId, NextIds},
};

mod record;
mod upgrade;

const FILE: &str = "netdp.redb";
/// Version of tables and records; earlier ones are upgraded when they are opened, others are refused.
const SCHEMA: u32 = 3;

/// "schema", "next_network", "next_endpoint".
const NUMBERS: TableDefinition<&str, u32> = TableDefinition::new("numbers");
/// Network id → record.
const NETWORKS: TableDefinition<u32, &[u8]> = TableDefinition::new("networks");
/// Endpoint id → record.
const ENDPOINTS: TableDefinition<u32, &[u8]> = TableDefinition::new("endpoints");
/// "unique_local" → this host's prefix of unique local IPv6 addresses.
const TEXTS: TableDefinition<&str, &str> = TableDefinition::new("texts");
/// Path of a sysctl that we changed → its value before.
const SYSCTLS: TableDefinition<&str, &str> = TableDefinition::new("sysctls");

/// The open store; nobody else opens it meanwhile.
#[derive(Debug)]
pub struct Store {
    database: Database,
    path: PathBuf,
    /// Held, not read: the lock lives as long as the file is open.
    _lock: File,
}

impl Store {
    /// Whether there is a store in this directory.
    pub fn exists(state_dir: &Path) -> bool {
        state_dir.join(FILE).exists()
    }

    /// Opens the store in `state_dir`, which exists, and makes it where there is none.
    ///
    /// # Errors
    /// Fails when another process has it open, when it is damaged, and when a later version of
    /// netdp made it; nothing is written then. What an earlier version made is upgraded.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let lock = lock(state_dir)?;
        let path = state_dir.join(FILE);
        if !path.exists() {
            create(state_dir, &path).with_context(|| format!("create store {}", path.display()))?;
        }
        let database = Database::open(&path).map_err(|error| explain(error, &path))?;
        let store = Self { database, path, _lock: lock };
        store.check_schema()?;
        Ok(store)
    }

    fn check_schema(&self) -> Result<()> {
        let schema = self.number("schema")?;
        match schema {
            Some(SCHEMA) => return Ok(()),
            Some(earlier @ 1..SCHEMA) => {
                return self
                    .upgrade(earlier)
                    .with_context(|| format!("upgrade store {}", self.path.display()));
            }
            _ => {}
        }
        let found = schema.map_or("no version".to_owned(), |schema| format!("version {schema}"));
        bail!(
            "store {} has {found} where this netdp reads version {SCHEMA}: \
             use the netdp that wrote it, or move it away to start empty",
            self.path.display()
        )
    }

    /// In one transaction: whoever opens it next finds the old schema or the new one.
    fn upgrade(&self, earlier: u32) -> Result<()> {
        type Step = fn(&mut Map<String, Value>) -> Result<()>;

        let tables: [(_, &str, Step); 2] = [
            (NETWORKS, "network", upgrade::network_of_schema_1),
            (ENDPOINTS, "endpoint", upgrade::endpoint_of_schema_1),
        ];
        let transaction = self.database.begin_write()?;
        // Records of schema 2 read as what they are; who knows that one only must not read ours.
        for (table, noun, upgrade) in tables.into_iter().filter(|_| earlier == 1) {
            let records = self.records::<Map<String, Value>>(table, noun)?;
            let mut table = transaction.open_table(table)?;
            for (id, mut record) in records {
                upgrade(&mut record).with_context(|| format!("upgrade {noun} {id}"))?;
                table.insert(id, encode(&record)?.as_slice())?;
            }
        }
        transaction.open_table(NUMBERS)?.insert("schema", SCHEMA)?;
        transaction.commit()?;
        Ok(())
    }

    /// Reads the whole state.
    ///
    /// # Errors
    /// Fails when the file can't be read or a record makes no sense.
    pub fn load(&self) -> Result<Model> {
        self.read_model().with_context(|| format!("read store {}", self.path.display()))
    }

    fn read_model(&self) -> Result<Model> {
        let networks = self.records::<NetworkRecord>(NETWORKS, "network")?;
        let endpoints = self.records::<EndpointRecord>(ENDPOINTS, "endpoint")?;
        let default = NextIds::default();
        let next = NextIds {
            network: self.number("next_network")?.unwrap_or(default.network),
            endpoint: self.number("next_endpoint")?.unwrap_or(default.endpoint),
        };
        let networks: BTreeMap<_, _> = networks
            .into_iter()
            .map(|(id, record)| {
                let network = record.into_network(NetworkId(id));
                Ok((NetworkId(id), network.with_context(|| format!("decode network {id}"))?))
            })
            .collect::<Result<_>>()?;
        let endpoints: BTreeMap<_, _> = endpoints
            .into_iter()
            .map(|(id, record)| {
                let endpoint = record.into_endpoint(EndpointId(id));
                Ok((EndpointId(id), endpoint.with_context(|| format!("decode endpoint {id}"))?))
            })
            .collect::<Result<_>>()?;
        if let Some(orphan) = endpoints.values().find(|e| !networks.contains_key(&e.network)) {
            bail!(
                "endpoint {:?} belongs to network {}, which is missing",
                orphan.name,
                orphan.network.0
            );
        }
        let unique_local = self
            .text("unique_local")?
            .map(|text| text.parse().with_context(|| format!("decode unique local {text:?}")))
            .transpose()?;
        Ok(Model { networks, endpoints, next, unique_local })
    }

    /// Writes what differs between `old`, which is stored, and `new`, in one transaction.
    ///
    /// # Errors
    /// Fails when the file can't be written; `old` is stored then.
    pub fn save(&mut self, old: &Model, new: &Model) -> Result<()> {
        self.write_difference(old, new)
            .with_context(|| format!("write store {}", self.path.display()))
    }

    fn write_difference(&self, old: &Model, new: &Model) -> Result<()> {
        if old == new {
            return Ok(());
        }
        let transaction = self.database.begin_write()?;
        {
            let mut numbers = transaction.open_table(NUMBERS)?;
            numbers.insert("next_network", new.next.network)?;
            numbers.insert("next_endpoint", new.next.endpoint)?;

            if let Some(prefix) = new.unique_local {
                let mut texts = transaction.open_table(TEXTS)?;
                texts.insert("unique_local", prefix.to_string().as_str())?;
            }

            let mut networks = transaction.open_table(NETWORKS)?;
            for step in steps(&old.networks, &new.networks) {
                match step {
                    Step::Put(id, network) => {
                        let record = encode(&NetworkRecord::from(network))?;
                        networks.insert(id.0, record.as_slice())?;
                    }
                    Step::Remove(id) => drop(networks.remove(id.0)?),
                }
            }
            let mut endpoints = transaction.open_table(ENDPOINTS)?;
            for step in steps(&old.endpoints, &new.endpoints) {
                match step {
                    Step::Put(id, endpoint) => {
                        let record = encode(&EndpointRecord::from(endpoint))?;
                        endpoints.insert(id.0, record.as_slice())?;
                    }
                    Step::Remove(id) => drop(endpoints.remove(id.0)?),
                }
            }
        }
        transaction.commit()?;
        Ok(())
    }

    /// Remembers a sysctl's value from before we changed it. The first value stays: a later one
    /// would be our own.
    ///
    /// # Errors
    /// Fails when the file can't be written.
    pub fn remember_sysctl(&mut self, path: &str, original: &str) -> Result<()> {
        let remember = || -> Result<()> {
            let transaction = self.database.begin_write()?;
            {
                let mut sysctls = transaction.open_table(SYSCTLS)?;
                if sysctls.get(path)?.is_none() {
                    sysctls.insert(path, original)?;
                }
            }
            Ok(transaction.commit()?)
        };
        remember().with_context(|| format!("remember sysctl {path} in {}", self.path.display()))
    }

    /// The sysctls that we changed, with their values from before.
    ///
    /// # Errors
    /// Fails when the file can't be read.
    pub fn remembered_sysctls(&self) -> Result<BTreeMap<String, String>> {
        let read = || -> Result<BTreeMap<String, String>> {
            let Some(sysctls) = found(self.database.begin_read()?.open_table(SYSCTLS))? else {
                return Ok(BTreeMap::new());
            };
            let mut remembered = BTreeMap::new();
            for entry in sysctls.iter()? {
                let (path, original) = entry?;
                remembered.insert(path.value().to_owned(), original.value().to_owned());
            }
            Ok(remembered)
        };
        read().with_context(|| format!("read sysctls of {}", self.path.display()))
    }

    /// Forgets a sysctl whose value has been put back.
    ///
    /// # Errors
    /// Fails when the file can't be written.
    pub fn forget_sysctl(&mut self, path: &str) -> Result<()> {
        let forget = || -> Result<()> {
            let transaction = self.database.begin_write()?;
            transaction.open_table(SYSCTLS)?.remove(path)?;
            Ok(transaction.commit()?)
        };
        forget().with_context(|| format!("forget sysctl {path} in {}", self.path.display()))
    }

    /// Empties the store, ids included.
    ///
    /// # Errors
    /// Fails when the file can't be written; everything is still there then.
    pub fn clear(&mut self) -> Result<()> {
        let clear = || -> Result<()> {
            let transaction = self.database.begin_write()?;
            transaction.delete_table(NETWORKS)?;
            transaction.delete_table(ENDPOINTS)?;
            transaction.delete_table(TEXTS)?;
            transaction.delete_table(SYSCTLS)?;
            transaction.delete_table(NUMBERS)?;
            transaction.open_table(NUMBERS)?.insert("schema", SCHEMA)?;
            Ok(transaction.commit()?)
        };
        clear().with_context(|| format!("empty store {}", self.path.display()))
    }

    /// Removes the store that was here, and the directory if nothing else is in it.
    ///
    /// # Errors
    /// Fails when the file is there and can't be removed.
    pub fn remove(state_dir: &Path) -> Result<()> {
        let path = state_dir.join(FILE);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove store {}", path.display()));
            }
            _ => {}
        }
        // What else is in the directory is not ours, and keeps it.
        let _not_empty = fs::remove_dir(state_dir);
        Ok(())
    }

    fn number(&self, key: &str) -> Result<Option<u32>> {
        let Some(numbers) = found(self.database.begin_read()?.open_table(NUMBERS))? else {
            return Ok(None);
        };
        Ok(numbers.get(key)?.map(|number| number.value()))
    }

    fn text(&self, key: &str) -> Result<Option<String>> {
        let Some(texts) = found(self.database.begin_read()?.open_table(TEXTS))? else {
            return Ok(None);
        };
        Ok(texts.get(key)?.map(|text| text.value().to_owned()))
    }

    fn records<T: DeserializeOwned>(
        &self,
        table: TableDefinition<u32, &[u8]>,
        noun: &str,
    ) -> Result<Vec<(u32, T)>> {
        let Some(table) = found(self.database.begin_read()?.open_table(table))? else {
            return Ok(Vec::new());
        };
        let mut records = Vec::new();
        for entry in table.iter()? {
            let (id, record) = entry?;
            let id = id.value();
            let record = serde_json::from_slice(record.value())
                .with_context(|| format!("decode {noun} {id}"))?;
            records.push((id, record));
        }
        Ok(records)
    }
}

/// Takes the directory's lock. The directory, not the file, so that creating is covered, too.
fn lock(state_dir: &Path) -> Result<File> {
    let directory = File::open(state_dir)
        .with_context(|| format!("open state directory {}", state_dir.display()))?;
    match directory.try_lock() {
        Ok(()) => Ok(directory),
        Err(TryLockError::WouldBlock) => {
            bail!("another agent works with {}: stop it first", state_dir.display())
        }
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("lock state directory {}", state_dir.display()))
        }
    }
}

/// Makes an empty store beside and moves it into place, so that a file that is there is whole.
fn create(state_dir: &Path, path: &Path) -> Result<()> {
    let unfinished = state_dir.join(format!("{FILE}.new"));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&unfinished)?;
    let database = redb::Builder::new().create_file(file)?;
    let transaction = database.begin_write()?;
    transaction.open_table(NUMBERS)?.insert("schema", SCHEMA)?;
    transaction.commit()?;
    drop(database);
    fs::rename(&unfinished, path)?;
    File::open(state_dir)?.sync_all()?;
    Ok(())
}

fn explain(error: DatabaseError, path: &Path) -> anyhow::Error {
    let path = path.display();
    match error {
        DatabaseError::DatabaseAlreadyOpen => {
            anyhow!("another process has store {path} open: stop it first")
        }
        DatabaseError::Storage(redb::StorageError::Io(error))
            if error.kind() != io::ErrorKind::InvalidData =>
        {
            anyhow::Error::new(error).context(format!("open store {path}"))
        }
        damage => anyhow!(
            "store {path} is damaged ({damage}): nothing was changed; put a backup in its place, \
             or move it away and run `netdp purge` to start empty"
        ),
    }
}

/// A table that nothing was written to does not exist.
fn found<T>(table: Result<T, TableError>) -> Result<Option<T>, TableError> {
    match table {
        Ok(table) => Ok(Some(table)),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn encode(record: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(record).context("encode a record")
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::PermissionsExt,
        thread,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::model::{
        GatewayMode, NatBehaviour, NetworkSpec, OfferSpec, Protocol, PublishedKey, policy,
        tests as fixture,
    };

    /// A model that uses every field.
    fn full_model() -> Model {
        let mut model = fixture::model_with_network("a");
        let spec = NetworkSpec {
            snat_ips: vec!["10.0.0.4".parse().unwrap(), "fd00::9".parse().unwrap()],
            enable_ipv6: Some(true),
            global_id: [1, 2, 3, 4, 5],
            gateway_mode: Some(GatewayMode::NatUnprotected),
            icc: Some(false),
            endpoint_flows: Some(1000),
            nat: Some(NatBehaviour::EndpointIndependent),
            engine_id: Some("4a10".to_owned()),
            reserved: ["172.21.0.9".parse().unwrap()].into(),
            ..fixture::network_spec("b", "172.21.0.0/24")
        };
        model.create_network(spec, &fixture::host()).unwrap();
        let rules = "allow from 192.0.2.1-192.0.2.3\nallow from fd00::/8\ndeny from any";
        let rules = policy::parse(rules).unwrap();
        model.set_policy("a", rules).unwrap();
        let mut spec = fixture::connect_spec("a", "A1");
        spec.publish = vec!["8080:80".parse().unwrap(), "10.0.0.2:53:53/udp".parse().unwrap()];
        model.connect(spec, &fixture::host()).unwrap();
        let mut spec = fixture::connect_spec("b", "B1");
        spec.publish = vec!["8081:80".parse().unwrap(), "7000/sctp".parse().unwrap()];
        model.connect(spec, &fixture::host()).unwrap();
        let spec = OfferSpec {
            network: "4a10".to_owned(),
            id: "e5".to_owned(),
            name: None,
            addresses: Vec::new(),
            mac: None,
        };
        model.offer(spec, &fixture::host()).unwrap();
        model.take("e5", "/run/docker/netns/e5".into()).unwrap();
        model
    }

    /// Opens what was closed a moment ago. Other tests start programs, and a child has a copy of our
    /// lock until it is one.
    fn reopen(dir: &Path) -> Result<Store> {
        let deadline = Instant::now() + Duration::from_secs(4);
        loop {
            match Store::open(dir) {
                Err(error)
                    if error.to_string().contains("another agent") && Instant::now() < deadline =>
                {
                    thread::yield_now();
                }
                result => return result,
            }
        }
    }

    #[test]
    fn what_was_saved_is_loaded_by_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        assert_eq!(store.load().unwrap(), Model::default());
        let model = full_model();
        store.save(&Model::default(), &model).unwrap();
        drop(store);

        let mut store = reopen(dir.path()).unwrap();
        assert_eq!(store.load().unwrap(), model);
        let mut smaller = model.clone();
        smaller.disconnect("a", "A1").unwrap();
        smaller.disconnect("b", "B1").unwrap();
        smaller.withdraw("e5").unwrap();
        smaller.remove_network("b").unwrap();
        store.save(&model, &smaller).unwrap();
        assert_eq!(store.load().unwrap(), smaller);

        store.clear().unwrap();
        assert_eq!(store.load().unwrap(), Model::default());
        drop(store);
        assert_eq!(reopen(dir.path()).unwrap().load().unwrap(), Model::default());
    }

    #[test]
    fn the_file_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        drop(Store::open(dir.path()).unwrap());
        let mode = fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(Store::exists(dir.path()));
    }

    #[test]
    fn the_first_value_of_a_sysctl_is_the_remembered_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        assert_eq!(store.remembered_sysctls().unwrap(), BTreeMap::new());
        store.remember_sysctl("net/ipv4/ip_forward", "0").unwrap();
        store.remember_sysctl("net/ipv4/ip_forward", "1").unwrap();
        let remembered = BTreeMap::from([("net/ipv4/ip_forward".to_owned(), "0".to_owned())]);
        assert_eq!(store.remembered_sysctls().unwrap(), remembered);
        store.forget_sysctl("net/ipv4/ip_forward").unwrap();
        store.forget_sysctl("net/ipv4/ip_forward").unwrap();
        assert_eq!(store.remembered_sysctls().unwrap(), BTreeMap::new());
    }

    #[test]
    fn a_second_opener_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Store::open(dir.path()).unwrap();
        let error = Store::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("another agent works with"), "{error}");
    }

    #[test]
    fn a_damaged_store_is_reported_and_left_alone() {
        let whole = {
            let dir = tempfile::tempdir().unwrap();
            let mut store = Store::open(dir.path()).unwrap();
            store.save(&Model::default(), &full_model()).unwrap();
            drop(store);
            fs::read(dir.path().join(FILE)).unwrap()
        };
        for damaged in [b"".to_vec(), b"no database".repeat(100), whole[..whole.len() / 3].to_vec()]
        {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(FILE);
            fs::write(&path, &damaged).unwrap();
            let error = format!("{:#}", Store::open(dir.path()).unwrap_err());
            assert!(error.contains("is damaged"), "{error}");
            assert_eq!(fs::read(&path).unwrap(), damaged, "the damaged file was written to");
        }
    }

    #[test]
    fn a_removed_store_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().join("state");
        fs::create_dir(&state_dir).unwrap();
        drop(Store::open(&state_dir).unwrap());
        Store::remove(&state_dir).unwrap();
        assert!(!state_dir.exists());
        Store::remove(&state_dir).unwrap();
    }

    #[test]
    fn another_schema_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let transaction = store.database.begin_write().unwrap();
        transaction.open_table(NUMBERS).unwrap().insert("schema", SCHEMA + 1).unwrap();
        transaction.commit().unwrap();
        drop(store);
        let error = reopen(dir.path()).unwrap_err().to_string();
        assert!(error.contains("has version 4 where this netdp reads version 3"), "{error}");
    }

    #[test]
    fn a_store_of_the_schema_before_opens_and_goes_on() {
        let network = serde_json::json!({
            "name": "a", "bridge": "nd-1", "subnet": "172.20.0.0/24", "gateway": "172.20.0.1",
            "range": "172.20.0.0/25", "gateway_mode": "nat-unprotected", "internal": false,
            "icc": true, "masquerade": true, "mtu": 1500, "host_binding": "127.0.0.1",
            "snat_ip": "10.0.0.4", "policy_generation": 7, "next_address": "172.20.0.3",
            "policy": [
                {"allow": true, "first": "192.0.2.1", "last": "192.0.2.3"},
                {"allow": false, "first": "0.0.0.0", "last": "255.255.255.255"},
            ],
        });
        let endpoint = serde_json::json!({
            "network": 1, "name": "A1", "netns": "/run/netns/A1", "netns_device": 4,
            "netns_inode": 5, "host_interface": "ndv1", "interface": "eth0",
            "address": "172.20.0.2", "mac": [2, 66, 172, 20, 0, 2],
            "published": [{"protocol": "tcp", "host_address": "127.0.0.1", "host_port": 8080,
                           "container_port": 80}],
        });
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let transaction = store.database.begin_write().unwrap();
        transaction.open_table(NUMBERS).unwrap().insert("schema", 1).unwrap();
        for (table, record) in [(NETWORKS, network), (ENDPOINTS, endpoint)] {
            let record = encode(&record).unwrap();
            transaction.open_table(table).unwrap().insert(1, record.as_slice()).unwrap();
        }
        transaction.commit().unwrap();
        drop(store);

        let upgraded = reopen(dir.path()).unwrap().load().unwrap();
        let network = upgraded.network("a").unwrap();
        let side = network.ipv4.unwrap();
        assert_eq!(side.range, "172.20.0.0/25".parse().unwrap());
        assert_eq!(side.host_binding, Some("127.0.0.1".parse().unwrap()));
        assert_eq!(side.snat_ip, Some("10.0.0.4".parse().unwrap()));
        assert_eq!((network.ipv6, network.policy_generation), (None, 7));
        assert_eq!(network.endpoint_flows, 0);
        let rules: Vec<_> = network.policy.iter().map(ToString::to_string).collect();
        assert_eq!(rules, ["allow from 192.0.2.1-192.0.2.3", "deny from any"]);
        let endpoint = upgraded.endpoint("a", "A1").unwrap();
        assert_eq!(endpoint.ipv4, Some("172.20.0.2".parse().unwrap()));
        let ports: Vec<_> = endpoint.ports().map(|port| port.to_string()).collect();
        assert_eq!(ports, ["tcp 127.0.0.1:8080"]);
        // And once more, as what it is now.
        assert_eq!(reopen(dir.path()).unwrap().load().unwrap(), upgraded);
    }

    /// As [`ENDPOINTS`] has them, in the shape of schema 2: each port for itself.
    #[test]
    fn ports_that_follow_each_other_are_one_entry_and_were_not_before() {
        let mut model = full_model();
        let id = model.endpoint("a", "A1").unwrap().id;
        let endpoint = model.endpoints.get_mut(&id).unwrap();
        let first = PublishedKey {
            address: "0.0.0.0".parse().unwrap(),
            port: 3000,
            protocol: Protocol::Tcp,
        };
        endpoint.published.insert_run(first, 3999, 80);
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        store.save(&Model::default(), &model).unwrap();
        let raw = || -> Map<String, Value> {
            let records = store.records(ENDPOINTS, "endpoint").unwrap();
            records.into_iter().find(|(found, _)| *found == id.0).unwrap().1
        };
        let entry = |port: u16, more: Option<u16>| {
            let mut entry = serde_json::json!({
                "protocol": "tcp", "host_address": "0.0.0.0", "host_port": 3000 + port,
                "container_port": 80 + port,
            });
            if let Some(more) = more {
                entry["more"] = more.into();
            }
            entry
        };
        let mut record = raw();
        let ports = record["published"].as_array_mut().unwrap();
        assert!(ports.contains(&entry(0, Some(999))), "{ports:?}");

        ports.retain(|port| *port != entry(0, Some(999)));
        ports.extend((0..1000).map(|port| entry(port, None)));
        let transaction = store.database.begin_write().unwrap();
        transaction.open_table(NUMBERS).unwrap().insert("schema", 2).unwrap();
        let record = encode(&record).unwrap();
        transaction.open_table(ENDPOINTS).unwrap().insert(id.0, record.as_slice()).unwrap();
        transaction.commit().unwrap();
        drop(store);
        assert_eq!(reopen(dir.path()).unwrap().load().unwrap(), model);
    }

    #[test]
    fn a_start_that_was_cut_off_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(format!("{FILE}.new")), b"half").unwrap();
        assert_eq!(Store::open(dir.path()).unwrap().load().unwrap(), Model::default());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
