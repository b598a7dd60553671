{{/* What every pod of the chart has: no token, no links, no root, and where and how the cluster lets it run. */}}
{{- define "lowbit.podBase" -}}
serviceAccountName: {{ include "lowbit.serviceAccountName" . | quote }}
automountServiceAccountToken: false
# A Service named lowbit would set LOWBIT_PORT=tcp://… in every pod.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  {{- with .Values.podSecurityContext }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with concat (default list (.Values.global).imagePullSecrets) .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ if kindIs "string" . }}{{ quote . }}{{ else }}{{ quote .name }}{{ end }}
  {{- end }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.hostAliases }}
hostAliases:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with default (ternary "ClusterFirstWithHostNet" "" .Values.hostNetwork) .Values.dnsPolicy }}
dnsPolicy: {{ . }}
{{- end }}
{{- with .Values.dnsConfig }}
dnsConfig:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What every container shares: (dict "root" $), and of its own: "settings", whether it reads the server's; "env" and
"mounts", lists in YAML; "client", whether it talks to the Service alone, for which no proxy is asked.
Caches of vLLM, torch and the hub follow HOME; torch asks for a user name, which the image may not know. */}}
{{- define "lowbit.container" -}}
{{- $ := .root -}}
{{- $client := .client -}}
image: {{ include "lowbit.image" $ | quote }}
imagePullPolicy: {{ $.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- if or .settings $.Values.extraEnvFrom }}
envFrom:
  {{- with $.Values.extraEnvFrom }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- if .settings }}
  # Last, so that it wins.
  - configMapRef: {name: {{ include "lowbit.fullname" $ | quote }}}
  {{- end }}
{{- end }}
env:
  - {name: HOME, value: /cache}
  - {name: USER, value: lowbit}
  {{- with .env }}
  {{- trim . | nindent 2 }}
  {{- end }}
  {{- if $client }}
  - {name: NO_PROXY, value: {{ include "lowbit.serviceHost" $ | quote }}}
  - {name: no_proxy, value: {{ include "lowbit.serviceHost" $ | quote }}}
  {{- end }}
  {{- range $.Values.extraEnv }}
  {{- if not (and $client (eq (lower .name) "no_proxy")) }}
  {{- toYaml (list .) | nindent 2 }}
  {{- end }}
  {{- end }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  - {name: cache, mountPath: /cache}
  {{- with .mounts }}
  {{- trim . | nindent 2 }}
  {{- end }}
  {{- with $.Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* (dict "root" $ "tmp" SIZE "cache" SIZE "claim" NAME "own" YAML): the volumes of a pod; a claim takes the place of the cache. */}}
{{- define "lowbit.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: {{ include "lowbit.setting" .tmp | quote }}}
- name: cache
  {{- if .claim }}
  persistentVolumeClaim: {claimName: {{ .claim | quote }}}
  {{- else }}
  emptyDir: {sizeLimit: {{ include "lowbit.setting" .cache | quote }}}
  {{- end }}
{{- with .own }}
{{ trim . }}
{{- end }}
{{- with .root.Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* (list $ VOLUME SECRET): readable by the pod's group, or by its only user where the cluster gives the ids. */}}
{{- define "lowbit.secretVolume" -}}
- name: {{ index . 1 }}
  secret: {secretName: {{ index . 2 | quote }}, defaultMode: {{ ternary "0440" "0444" (hasKey (default dict (first .).Values.podSecurityContext) "fsGroup") }}}
{{- end -}}

{{/* resources of a container: (dict "resources" … "gpus" … "resourceName" …). GPUs come from a device plugin, or from
the claims where it has some. */}}
{{- define "lowbit.resources" -}}
requests:
  {{- toYaml .resources.requests | nindent 2 }}
limits:
  {{- toYaml .resources.limits | nindent 2 }}
  {{- if and (gt (int .gpus) 0) (not .resources.claims) }}
  {{ .resourceName }}: {{ int .gpus }}
  {{- end }}
{{- with .resources.claims }}
claims:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* (list $ RESOURCES): of resourceClaims those that the container uses. */}}
{{- define "lowbit.resourceClaims" -}}
{{- $used := list -}}
{{- range (last .).claims }}{{ $used = append $used .name }}{{ end -}}
{{- if $used -}}
resourceClaims:
  {{- range (first .).Values.resourceClaims }}
  {{- if has .name $used }}
  {{- toYaml (list .) | nindent 2 }}
  {{- end }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* A hub token. (list $ HUB): its volume. HUB: its mount, and the variable that names the file. */}}
{{- define "lowbit.hubVolume" -}}
{{- with (last .).existingSecret }}
{{ include "lowbit.secretVolume" (list (first $) "hub-token" .) }}
{{- end }}
{{- end -}}

{{- define "lowbit.hubMount" -}}
{{- if .existingSecret }}
- {name: hub-token, mountPath: /etc/lowbit/hub, readOnly: true}
{{- end }}
{{- end -}}

{{- define "lowbit.hubEnv" -}}
{{- if .existingSecret }}
- {name: HF_TOKEN_PATH, value: {{ printf "/etc/lowbit/hub/%s" .key | quote }}}
{{- end }}
{{- end -}}

{{/* Ports on which a download leaves: name servers, HTTPS, and those of proxies and mirrors in extraEnv. */}}
{{- define "lowbit.downloadPorts" -}}
{{- $ports := list 443 -}}
{{- range .Values.extraEnv -}}
{{- if regexMatch "(?i)^(https?_proxy|all_proxy|hf_endpoint)$" .name -}}
{{- $url := default "" .value -}}
{{- with regexFind "^([a-z0-9]+://)?[^/]*:[0-9]+(/|$)" $url -}}
{{- $ports = append $ports (regexFind "[0-9]+" (regexFind ":[0-9]+(/|$)" .) | int) -}}
{{- else -}}
{{- if not (hasPrefix "https://" $url) }}{{ $ports = append $ports 80 }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}
- {port: 53, protocol: UDP}
- {port: 53, protocol: TCP}
{{- range uniq $ports }}
- {port: {{ . }}, protocol: TCP}
{{- end }}
{{- end -}}
