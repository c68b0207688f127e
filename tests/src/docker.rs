//! Runs Docker's own daemon on the lab's host and speaks to it through its command line.
//!
//! The daemon has a root directory, mounts and processes of its own: whatever becomes of the test, they
//! end together, and with them the containers. Knows Docker's words for what the lab's verbs mean.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use crate::backend::Firewall;
use crate::kept::Kept;
use crate::namespace::{Fate, Namespace};
use crate::runtime::poll_until;

/// Names the directory that is the root of Docker's processes.
const ROOT_VARIABLE: &str = "NETDP_DOCKER";
/// Where Docker's programs are.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where the lab's files are, as Docker sees them.
const FILES: &str = "/run/netdp";
/// The image that containers are made from.
pub const IMAGE: &str = "busybox";
/// A daemon is up in a second where nothing else runs.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// How long killed processes may take to let go of their control groups.
const END_DEADLINE: Duration = Duration::from_secs(10);
/// How much of the log a failure shows, in lines.
const LOG_LINES: usize = 30;

/// Makes the root, sees to what a daemon expects there, and becomes the daemon: `$1` is Docker's root
/// directory, `$2` where to have it, `$3` the lab's files, the rest the daemon's command line.
const BECOME_DAEMON: &str = r#"
set -e
read -r pid rest < /proc/self/stat
root=$2 files=$3
mount --bind "$1" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount --rbind /sys/fs/cgroup "$root/sys/fs/cgroup"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mkdir "$root/run/netdp"
mount --bind "$files" "$root/run/netdp"
# As whoever is outside knows this process.
echo "$pid" > "$files/pid"
mkdir -p "$root/run/docker/plugins"
mount --bind "$files/plugins" "$root/run/docker/plugins"
shift 3
exec chroot "$root" "$@"
"#;

/// Starts a daemon, and another whenever one has ended; whatever it leaves behind goes on beside.
const KEEP_DAEMON: &str = r#"while :; do "$@" || sleep 1; done"#;

/// Has a daemon kept, which has no process namespace of its own then, and can start anew in it.
const KEPT: [&str; 5] = ["/bin/busybox", "sh", "-c", KEEP_DAEMON, "sh"];

/// Docker as it is on this machine: a root directory and what its daemon says of itself.
#[derive(Clone, Debug)]
pub struct Installation {
    root: PathBuf,
    /// As `28.5.2`, with whatever the distribution adds.
    pub version: String,
    /// Whether the daemon can be told what firewall to use: Docker 29 and later.
    pub knows_firewalls: bool,
}

impl Installation {
    /// Looks for Docker in `$NETDP_DOCKER`, once: `/` is what is installed on this machine.
    ///
    /// # Errors
    /// When there is none, with what to do.
    pub fn find() -> Result<&'static Self> {
        static FOUND: LazyLock<Result<Installation>> = LazyLock::new(Installation::look);
        FOUND.as_ref().map_err(|error| anyhow!("{error:#}"))
    }

    fn look() -> Result<Self> {
        let root = std::env::var_os(ROOT_VARIABLE).with_context(|| {
            format!("find Docker: {ROOT_VARIABLE} names no root directory that has it")
        })?;
        let root = fs::canonicalize(&root)
            .with_context(|| format!("find {ROOT_VARIABLE}={}", root.display()))?;
        let ask = |question: &str| -> Result<String> {
            let said = Command::new("chroot")
                .arg(&root)
                .args(["dockerd", question])
                .env("PATH", PATH)
                .output()
                .context("run chroot")?;
            let error = String::from_utf8_lossy(&said.stderr);
            ensure!(said.status.success(), "dockerd {question}: {}", error.trim());
            String::from_utf8(said.stdout).context("read the output of dockerd")
        };
        // "Docker version 28.5.2+dfsg4, build 3ef3c07"
        let line = ask("--version")?;
        let version = line.split([' ', ',']).nth(2).context("read dockerd's version")?.to_owned();
        let knows_firewalls = ask("--help")?.contains("--firewall-backend");
        Ok(Self { root, version, knows_firewalls })
    }

    /// The path of a program, for processes that have another root; it has to do without libraries.
    #[must_use]
    pub fn program(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// The first number of the version.
    #[must_use]
    pub fn major(&self) -> Option<u32> {
        self.version.split('.').next()?.parse().ok()
    }
}

/// A port of the host that leads to one of a container, in the words of `netdp connect --json`.
#[derive(Debug, serde::Serialize)]
struct PublishedPort {
    host_ip: String,
    host_port: u16,
    container_port: u16,
}

/// Whose networks containers are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Driver {
    /// Docker's own.
    Bridge,
    /// The agent's on the same host.
    Netdp,
}

/// A daemon in one namespace.
#[derive(Debug)]
pub struct Docker {
    namespace: Namespace,
    /// The process that ends all others when it ends.
    guard: Kept,
    pid: u32,
    files: PathBuf,
    cgroup: String,
    firewall: Firewall,
}

impl Docker {
    /// Starts a daemon that keeps everything below `directory`, and makes its image.
    ///
    /// # Errors
    /// With the end of its log when it does not come up.
    pub fn start(namespace: &Namespace, directory: &Path, firewall: Firewall) -> Result<Self> {
        let installed = Installation::find()?;
        let (root, files) = (directory.join("docker/root"), directory.join("docker/files"));
        for directory in [&root, &files, &files.join("plugins")] {
            fs::create_dir_all(directory).context("create a directory")?;
        }
        if firewall == Firewall::Nftables {
            // With that Docker leaves it to the host's owner whether the host forwards at all.
            for setting in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
                namespace.set_sysctl(setting, "1")?;
            }
        }
        let cgroup = format!("netdp-{}", namespace.name());
        let settings = settings(&cgroup, firewall, installed);
        fs::write(files.join("daemon.json"), settings.to_string()).context("write settings")?;
        let log = File::create(files.join("log")).context("create Docker's log")?;
        let mut command = namespace.command("unshare", Fate::DiesWithParent)?;
        command
            .args(["--mount", "--pid", "--fork", "--kill-child=KILL", "sh", "-c", BECOME_DAEMON])
            .arg("sh")
            .args([&installed.root, &root, &files])
            .args(if firewall == Firewall::Off { &KEPT[..] } else { &[] })
            .args(["dockerd", "--config-file", &format!("{FILES}/daemon.json")])
            .env("PATH", PATH)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("clone Docker's log")?)
            .stderr(log);
        let guard = Kept::spawn(command).context("run unshare; install util-linux")?;
        // From here on Drop ends it after a step that fails.
        let mut docker =
            Self { namespace: namespace.clone(), guard, pid: 0, files, cgroup, firewall };
        let failed = |docker: &Self| format!("Docker's log ends with:\n{}", docker.log_tail());
        docker.wait_until_up().with_context(|| failed(&docker))?;
        docker.make_image().with_context(|| failed(&docker))?;
        Ok(docker)
    }

    /// Where a plugin of the name netdp has to listen for a daemon that keeps everything below
    /// `directory`.
    #[must_use]
    pub fn plugin_socket(directory: &Path) -> PathBuf {
        directory.join("docker/files/plugins/netdp.sock")
    }

    fn wait_until_up(&mut self) -> Result<()> {
        let socket = self.files.join("docker.sock");
        poll_until(START_DEADLINE, "Docker's first answer", || {
            if let Some(status) = self.guard.try_wait().context("ask for Docker's state")? {
                bail!("start Docker: it ended with {status}");
            }
            Ok(UnixStream::connect(&socket).ok().map(drop))
        })?;
        let pid = fs::read_to_string(self.files.join("pid")).context("read Docker's pid")?;
        self.pid = pid.trim().parse().context("read Docker's pid")?;
        Ok(())
    }

    /// Nothing but a program that sleeps: probes enter a container's network from outside.
    fn make_image(&self) -> Result<()> {
        let said = Command::new("tar")
            .arg("-C")
            .arg(self.root()?)
            .args(["--dereference", "-cf"])
            .arg(self.files.join("image.tar"))
            .arg("bin/busybox")
            .output()
            .context("run tar")?;
        ensure!(said.status.success(), "tar: {}", String::from_utf8_lossy(&said.stderr).trim());
        self.import(IMAGE, "LABEL netdp=tests")
    }

    /// Makes an image of busybox alone, with one line of a Dockerfile laid over it.
    ///
    /// # Errors
    /// When Docker refuses.
    pub fn import(&self, name: &str, line: &str) -> Result<()> {
        let tar = format!("{FILES}/image.tar");
        self.run(&["import", "--change", line, &tar, name]).map(drop)
    }

    /// Docker's root directory, with all that is mounted there.
    fn root(&self) -> Result<PathBuf> {
        ensure!(self.pid != 0, "find Docker's root: it is not up");
        Ok(Path::new("/proc").join(self.pid.to_string()).join("root"))
    }

    /// Prepares a command on the host that sees Docker's files.
    fn enter(&self, program: &str) -> Result<Command> {
        let mut command = self.namespace.command("nsenter", Fate::DiesWithParent)?;
        command
            .args(["--target", &self.pid.to_string(), "--mount", "--root", program])
            .env("PATH", PATH)
            .env("DOCKER_HOST", format!("unix://{FILES}/docker.sock"))
            .env("DOCKER_CONFIG", FILES);
        Ok(command)
    }

    /// Ends the daemon and waits for the next one, which reads its settings with `settings` laid over
    /// them.
    ///
    /// # Errors
    /// When it does not end, or none follows.
    pub fn restart(&self, settings: &Value) -> Result<()> {
        let path = self.files.join("daemon.json");
        let text = fs::read_to_string(&path).context("read settings")?;
        let mut all: Value = serde_json::from_str(&text).context("read settings")?;
        for (name, value) in settings.as_object().into_iter().flatten() {
            all[name] = value.clone();
        }
        fs::write(&path, all.to_string()).context("write settings")?;
        let old = self.daemon().context("find Docker's daemon")?;
        let guard = self.pid.to_string();
        let ended = Command::new("nsenter")
            .args(["--target", &guard, "--pid", "--mount", "--root"])
            .args(["/bin/busybox", "kill", "-TERM", &old])
            .output()
            .context("run nsenter")?;
        let error = String::from_utf8_lossy(&ended.stderr);
        ensure!(ended.status.success(), "end Docker's daemon: {}", error.trim());
        let socket = self.files.join("docker.sock");
        poll_until(START_DEADLINE, "Docker's next daemon", || {
            let is_another = self.daemon().is_ok_and(|pid| pid != old);
            Ok((is_another && UnixStream::connect(&socket).is_ok()).then_some(()))
        })
        .with_context(|| format!("Docker's log ends with:\n{}", self.log_tail()))
    }

    /// The daemon's process, as it is called in its own namespace.
    fn daemon(&self) -> Result<String> {
        let path = self.files.join("docker.pid");
        Ok(fs::read_to_string(path).context("read Docker's pid")?.trim().to_owned())
    }

    /// Runs one `docker` command.
    ///
    /// # Errors
    /// When it can't be started; its exit code is the caller's to judge.
    pub fn output<S: AsRef<str>>(&self, arguments: &[S]) -> Result<Output> {
        let mut command = self.enter("docker")?;
        let arguments = arguments.iter().map(AsRef::as_ref);
        command.args(arguments).stdin(Stdio::null()).output().context("run nsenter")
    }

    /// Runs one `docker` command that should succeed and returns what it printed.
    ///
    /// # Errors
    /// With what it said when it fails.
    pub fn run<S: AsRef<str>>(&self, arguments: &[S]) -> Result<String> {
        let output = self.output(arguments)?;
        let error = String::from_utf8_lossy(&output.stderr);
        let words: Vec<_> = arguments.iter().map(AsRef::as_ref).collect();
        let title = || format!("docker {}", words.join(" "));
        ensure!(output.status.success(), "{}: {}: {}", title(), output.status, error.trim());
        String::from_utf8(output.stdout).context("read the output of docker")
    }

    /// Whose networks it has.
    fn driver(&self) -> Driver {
        if self.firewall == Firewall::Off { Driver::Netdp } else { Driver::Bridge }
    }

    /// Creates a network with netdp's options: one of Docker's own on a bridge of its name, or one of
    /// netdp's that netdp knows by its name.
    ///
    /// # Errors
    /// When Docker refuses, or has no word for an option.
    pub fn create_network(&self, name: &str, subnets: &[&str], options: &[&str]) -> Result<()> {
        let driver = self.driver();
        let mut arguments = vec!["network", "create"];
        for subnet in subnets {
            arguments.extend(["--subnet", subnet]);
        }
        let is_ipv6 = subnets.iter().any(|subnet| subnet.contains(':'));
        if is_ipv6 {
            arguments.push("--ipv6");
        }
        let mut said = words(driver, options)?;
        match driver {
            Driver::Bridge => said.push(format!("--opt=com.docker.network.bridge.name={name}")),
            Driver::Netdp => {
                said.extend(["--driver=netdp".to_owned(), format!("--opt=netdp.name={name}")]);
            }
        }
        arguments.extend(said.iter().map(String::as_str));
        arguments.push(name);
        self.run(&arguments).map(drop)
    }

    /// Runs a container whose network becomes `namespace`, or connects one that runs, and says what
    /// Docker shows as published.
    ///
    /// # Errors
    /// When Docker refuses, or has no word for it.
    pub fn connect(
        &self,
        network: &str,
        namespace: &Namespace,
        name: &str,
        addresses: &[&str],
        published: &[&str],
    ) -> Result<Value> {
        if self.driver() == Driver::Netdp && self.containers()?.iter().any(|known| known == name) {
            ensure!(published.is_empty(), "publish ports of {name}: Docker does when it starts");
            self.join(network, name, addresses)?;
        } else {
            self.start_container(network, name, addresses, published)?;
        }
        let settings = self.enter_sandbox(namespace, name)?;
        Ok(json!({ "published": published_ports(&settings["Ports"])? }))
    }

    fn start_container(
        &self,
        network: &str,
        name: &str,
        addresses: &[&str],
        published: &[&str],
    ) -> Result<()> {
        let mut arguments = vec!["run".to_owned(), "--detach".to_owned(), format!("--name={name}")];
        let mut membership = format!("--network=name={network}");
        for address in addresses {
            membership.push_str(&format!(",{}={address}", address_option(address)));
        }
        if self.driver() == Driver::Netdp {
            membership.push_str(&format!(",driver-opt=netdp.name={name}"));
        }
        arguments.push(membership);
        arguments.extend(published.iter().map(|port| format!("--publish={port}")));
        arguments.extend([IMAGE, "/bin/busybox", "sleep", "1d"].map(String::from));
        self.run(&arguments).map(drop).or_else(|error| {
            // What could not start is there all the same.
            self.output(&["rm", "--force", name])?;
            Err(error)
        })
    }

    /// Connects a container that runs.
    fn join(&self, network: &str, name: &str, addresses: &[&str]) -> Result<()> {
        let mut arguments = vec!["network".to_owned(), "connect".to_owned()];
        arguments.push(format!("--driver-opt=netdp.name={name}"));
        let options = addresses.iter().map(|text| format!("--{}={text}", address_option(text)));
        arguments.extend(options);
        arguments.extend([network, name].map(String::from));
        self.run(&arguments).map(drop)
    }

    /// Makes `namespace` the network of a container that runs, and returns its network settings.
    ///
    /// # Errors
    /// When there is no such container, or it has no network.
    pub fn enter_sandbox(&self, namespace: &Namespace, name: &str) -> Result<Value> {
        let mut inspected = self.inspect(name)?;
        let settings = inspected["NetworkSettings"].take();
        let sandbox = settings["SandboxKey"].as_str().context("read the container's sandbox")?;
        namespace.become_another(&self.root()?.join(sandbox.trim_start_matches('/')))?;
        Ok(settings)
    }

    /// What `docker inspect` says, without a program that takes longer to start than to ask.
    ///
    /// # Errors
    /// When there is no such container.
    pub fn inspect(&self, name: &str) -> Result<Value> {
        self.ask(&format!("/containers/{name}/json"))
    }

    /// Names of all containers, running or not.
    fn containers(&self) -> Result<Vec<String>> {
        let list = self.ask("/containers/json?all=1")?;
        let names = list.as_array().into_iter().flatten().map(|one| one["Names"][0].as_str());
        Ok(names.flatten().map(|name| name.trim_start_matches('/').to_owned()).collect())
    }

    /// Names of all networks of netdp's.
    fn networks(&self) -> Result<Vec<String>> {
        let list = self.ask("/networks")?;
        let networks = list.as_array().into_iter().flatten();
        let netdps = networks.filter(|network| network["Driver"] == "netdp");
        Ok(netdps.filter_map(|network| network["Name"].as_str().map(String::from)).collect())
    }

    /// Removes all containers and all networks of netdp's.
    ///
    /// # Errors
    /// When Docker refuses.
    pub fn clear(&self) -> Result<()> {
        let (containers, networks) = (self.containers()?, self.networks()?);
        for (verb, names) in [(&["rm", "--force"], containers), (&["network", "rm"], networks)] {
            let names = names.iter().map(String::as_str);
            let arguments: Vec<_> = verb.iter().copied().chain(names).collect();
            if arguments.len() > verb.len() {
                self.run(&arguments)?;
            }
        }
        Ok(())
    }

    /// Asks the daemon.
    fn ask(&self, path: &str) -> Result<Value> {
        let title = || format!("ask Docker for {path}");
        let mut stream = UnixStream::connect(self.files.join("docker.sock")).with_context(title)?;
        // The answer of HTTP/1.0 is in one piece and ends with the connection.
        let question = format!("GET {path} HTTP/1.0\r\nHost: docker\r\n\r\n");
        stream.write_all(question.as_bytes()).with_context(title)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).with_context(title)?;
        let (head, body) = answer.split_once("\r\n\r\n").with_context(title)?;
        ensure!(head.contains(" 200 "), "{}: {answer}", title());
        serde_json::from_str(body).with_context(title)
    }

    /// Disconnects a container from a network. Of its own networks Docker has no other word for it
    /// that takes the published ports along than removing the container.
    ///
    /// # Errors
    /// When Docker refuses.
    pub fn disconnect(&self, network: &str, name: &str) -> Result<()> {
        match self.driver() {
            Driver::Bridge => self.run(&["rm", "--force", name]),
            Driver::Netdp => self.run(&["network", "disconnect", network, name]),
        }
        .map(drop)
    }

    /// Does in the chain that Docker leaves to its users what a policy of netdp's says.
    ///
    /// # Errors
    /// When a rule can't be read, or Docker's firewall has no such chain.
    pub fn set_policy(&self, network: &str, rules: &str) -> Result<()> {
        ensure!(self.firewall == Firewall::Iptables, "set a policy: nftables has no DOCKER-USER");
        for (family, program) in [("v4", "iptables-restore"), ("v6", "ip6tables-restore")] {
            let text = user_rules(network, rules, family == "v6")?;
            let path = self.files.join("rules");
            fs::write(&path, text).context("write rules")?;
            let said = self
                .enter(program)?
                .args(["--noflush", &format!("{FILES}/rules")])
                .output()
                .context("run nsenter")?;
            let error = String::from_utf8_lossy(&said.stderr);
            ensure!(said.status.success(), "{program}: {}", error.trim());
        }
        Ok(())
    }

    /// The daemon's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The end of the log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.files.join("log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        // The kernel ends the daemon with its guard, and whatever has started since with the daemon.
        self.guard.kill().ok();
        self.guard.wait().ok();
        if let Err(error) = poll_for_removal(&self.cgroup) {
            eprintln!("remove Docker's control groups: {error:#}");
        }
    }
}

/// What the daemon reads at its start.
fn settings(cgroup: &str, firewall: Firewall, installed: &Installation) -> Value {
    let mut settings = json!({
        "bridge": "none",
        "cgroup-parent": format!("/{cgroup}"),
        "data-root": format!("{FILES}/data"),
        "exec-opts": ["native.cgroupdriver=cgroupfs"],
        "exec-root": format!("{FILES}/exec"),
        "hosts": [format!("unix://{FILES}/docker.sock")],
        "pidfile": format!("{FILES}/docker.pid"),
        // Works on any file system, and an image is one program.
        "storage-driver": "vfs",
    });
    if firewall == Firewall::Off {
        settings["iptables"] = false.into();
        settings["ip6tables"] = false.into();
    } else if installed.knows_firewalls {
        settings["firewall-backend"] = firewall.name().into();
    }
    settings
}

/// What `docker` calls an address of a container.
fn address_option(address: &str) -> &'static str {
    if address.contains(':') { "ip6" } else { "ip" }
}

/// Docker's words for the options of `netdp network create`.
fn words(driver: Driver, options: &[&str]) -> Result<Vec<String>> {
    let opt = |key: &str, value: &str| format!("--opt=com.docker.network.{key}={value}");
    let mut said = Vec::new();
    let mut options = options.iter();
    while let Some(option) = options.next() {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, value),
            None if *option == "--internal" => (*option, ""),
            None => (*option, *options.next().context("find the value of an option")?),
        };
        match name {
            "--internal" => said.push("--internal".to_owned()),
            "--ipv4" | "--ipv6" => said.push(format!("{name}={value}")),
            "--icc" => said.push(opt("bridge.enable_icc", value)),
            "--masquerade" => said.push(opt("bridge.enable_ip_masquerade", value)),
            "--snat-ip" if value.contains(':') => said.push(opt("host_ipv6", value)),
            "--snat-ip" => said.push(opt("host_ipv4", value)),
            "--gateway-mode" => {
                for family in ["ipv4", "ipv6"] {
                    said.push(opt(&format!("bridge.gateway_mode_{family}"), value));
                }
                // Docker wants to be told that such a network has no way out; netdp knows.
                if value == "isolated" && driver == Driver::Bridge {
                    said.push("--internal".to_owned());
                }
            }
            "--opt" if driver == Driver::Netdp => said.push(format!("--opt={value}")),
            _ => bail!("create a network of Docker's with {option}: it has no word for that"),
        }
    }
    Ok(said)
}

/// Reads `{"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}]}`.
fn published_ports(ports: &Value) -> Result<Vec<PublishedPort>> {
    let mut published = Vec::new();
    for (container, hosts) in ports.as_object().into_iter().flatten() {
        let container_port = container.split('/').next().unwrap_or_default().parse()?;
        for host in hosts.as_array().into_iter().flatten() {
            let text = |field: &str| host[field].as_str().unwrap_or_default().to_owned();
            // A routed network has ports that are open and none of the host's that leads there.
            let Ok(host_port) = text("HostPort").parse() else { continue };
            published.push(PublishedPort { host_ip: text("HostIp"), host_port, container_port });
        }
    }
    Ok(published)
}

/// A policy of netdp's as rules of DOCKER-USER for one family: about whoever dials, not about answers.
fn user_rules(network: &str, rules: &str, is_ipv6: bool) -> Result<String> {
    let mut text = "*filter\n-F DOCKER-USER\n".to_owned();
    for rule in rules.lines().filter(|rule| !rule.is_empty() && !rule.starts_with('#')) {
        let (verb, whom) = rule.split_once(" from ").with_context(|| format!("read {rule}"))?;
        let target = match verb {
            "allow" => "RETURN",
            "deny" => "DROP",
            _ => bail!("read {rule}"),
        };
        let source = match whom {
            "any" => String::new(),
            whom if whom.contains(':') != is_ipv6 => continue,
            range if range.contains('-') => format!("-m iprange --src-range {range} "),
            prefix => format!("-s {prefix} "),
        };
        let direction = "-m conntrack --ctdir ORIGINAL";
        text.push_str(&format!("-A DOCKER-USER -o {network} {direction} {source}-j {target}\n"));
    }
    text.push_str("COMMIT\n");
    Ok(text)
}

/// Removes a control group and those below it from every hierarchy, once nobody is there any more.
fn poll_for_removal(name: &str) -> Result<()> {
    let base = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(base).context("list control groups")?;
    let hierarchies = hierarchies.filter_map(|entry| Some(entry.ok()?.path()));
    let groups: Vec<_> = hierarchies.chain([base.to_owned()]).map(|path| path.join(name)).collect();
    poll_until(END_DEADLINE, "the end of the containers", || {
        groups.iter().for_each(|group| remove_groups(group));
        Ok((!groups.iter().any(|group| group.is_dir())).then_some(()))
    })
}

/// Removes what can be removed: a group that has processes stays.
fn remove_groups(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    fs::remove_dir(group).ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_said_in_dockers_words() {
        let options = ["--icc=false", "--gateway-mode", "isolated", "--snat-ip", "fd00::22"];
        let said = words(Driver::Bridge, &options);
        let expected = [
            "--opt=com.docker.network.bridge.enable_icc=false",
            "--opt=com.docker.network.bridge.gateway_mode_ipv4=isolated",
            "--opt=com.docker.network.bridge.gateway_mode_ipv6=isolated",
            "--internal",
            "--opt=com.docker.network.host_ipv6=fd00::22",
        ];
        assert_eq!(said.unwrap(), expected);
        let of_netdp = words(Driver::Netdp, &options).unwrap();
        assert!(!of_netdp.contains(&"--internal".to_owned()), "{of_netdp:?}");
        let option = ["--opt", "netdp.nat=endpoint-independent"];
        assert!(words(Driver::Bridge, &option).is_err());
        let said = words(Driver::Netdp, &option).unwrap();
        assert_eq!(said, ["--opt=netdp.nat=endpoint-independent"]);
    }

    #[test]
    fn policies_become_rules_of_the_users_chain() {
        let rules = "# only\nallow from 192.0.2.1-192.0.2.3\nallow from fd00::/64\ndeny from any\n";
        let start = "-A DOCKER-USER -o net-a -m conntrack --ctdir ORIGINAL";
        let expected = format!(
            "*filter\n-F DOCKER-USER\n{start} -m iprange --src-range 192.0.2.1-192.0.2.3 -j RETURN\n\
             {start} -j DROP\nCOMMIT\n"
        );
        assert_eq!(user_rules("net-a", rules, false).unwrap(), expected);
        let expected = format!(
            "*filter\n-F DOCKER-USER\n{start} -s fd00::/64 -j RETURN\n{start} -j DROP\nCOMMIT\n"
        );
        assert_eq!(user_rules("net-a", rules, true).unwrap(), expected);
        assert!(user_rules("net-a", "permit from any", false).is_err());
    }

    #[test]
    fn published_ports_are_told_as_netdp_tells_them() {
        let ports = json!({
            "80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}, {"HostIp": "::", "HostPort": "8080"}],
            "81/udp": null,
        });
        let published = serde_json::to_value(published_ports(&ports).unwrap()).unwrap();
        let port = |host_ip| json!({"host_ip": host_ip, "host_port": 8080, "container_port": 80});
        assert_eq!(published, json!([port("0.0.0.0"), port("::")]));
    }
}
